"""No predictor sees what it may not: everything hidden is perturbed, and the scores stay equal to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speculation import PREDICTORS, Predictor, RoutingBatch, create
from speculation.neural import NeuralPredictor
from traces.reader import TraceDataset

# Neural predictors need weights that are not those they start from, not good ones.
FIT_LIMITS: dict[str, dict[str, Any]] = {
    name: {"max_steps": 3} for name, cls in PREDICTORS.items() if issubclass(cls, NeuralPredictor)
}
CONSTANT = {"frequency"}


@pytest.fixture(scope="module")
def batch(dataset: TraceDataset) -> RoutingBatch:
    stream = dataset.sequences("all", columns=("weights", "logits", "lookahead", "tokens"))
    return RoutingBatch.from_sequences([next(stream) for _ in range(3)], dataset.spec)


@pytest.fixture(scope="module")
def fitted(dataset: TraceDataset) -> dict[str, Predictor]:
    return {name: create(name).fit(dataset, **FIT_LIMITS.get(name, {})) for name in PREDICTORS}


def hide(batch: RoutingBatch, sequence: int, last_step: int) -> RoutingBatch:
    """The batch with everything random but the routing of one sequence up to `last_step` and the token ids up to its
    token.
    """
    generator = torch.Generator().manual_seed(last_step)
    tokens, layers, top_k = batch.expert_ids_TLK.shape
    start, stop = batch.offsets[sequence : sequence + 2].tolist()
    step_TL = torch.arange(tokens)[:, None] * layers + torch.arange(layers) - start * layers
    inside_T = (torch.arange(tokens) >= start) & (torch.arange(tokens) < stop)
    seen_TL = inside_T[:, None] & (step_TL <= last_step)

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator) + 0.1

    def mixed(seen: Tensor, kept: Tensor | None) -> Tensor | None:
        return None if kept is None else torch.where(seen, kept, noise(kept))

    other_ids = noise(torch.empty(tokens, layers, batch.num_experts)).argsort(dim=2)[:, :, :top_k]
    assert batch.lookahead_logits_THLE is not None
    assert batch.token_ids_T is not None
    horizons = batch.lookahead_logits_THLE.shape[1]
    # A lookahead entry is known with its source layer's routing, h steps before its target.
    source_THL = step_TL[:, None, :] - torch.arange(1, horizons + 1)[None, :, None]
    seen_THL = inside_T[:, None, None] & (source_THL <= last_step)
    known_T = inside_T & (torch.arange(tokens) - start <= last_step // layers)
    return replace(
        batch,
        expert_ids_TLK=torch.where(seen_TL[:, :, None], batch.expert_ids_TLK, other_ids),
        routing_weights_TLK=mixed(seen_TL[:, :, None], batch.routing_weights_TLK),
        router_logits_TLE=mixed(seen_TL[:, :, None], batch.router_logits_TLE),
        lookahead_logits_THLE=mixed(seen_THL[..., None], batch.lookahead_logits_THLE),
        token_ids_T=torch.where(known_T, batch.token_ids_T, torch.randint(1000, (tokens,), generator=generator)),
    )


def leaks(predictor: Predictor, batch: RoutingBatch, horizon: int) -> tuple[bool, bool]:
    """Whether a score that may not change did, and whether any other did."""
    _, layers, _ = batch.expert_ids_TLK.shape
    start, stop = batch.offsets[1:3].tolist()
    before = predictor.predict_scores(batch, horizon)[start:stop].flatten(0, 1)
    leaked = reacted = False
    # 7 and L = 4 have no common divisor: every layer is a last one.
    for last_step in range(-1, (stop - start) * layers, 7):
        after = predictor.predict_scores(hide(batch, 1, last_step), horizon)[start:stop].flatten(0, 1)
        determined = last_step + horizon + 1
        leaked |= not torch.equal(before[:determined], after[:determined])
        reacted |= not torch.equal(before[determined:], after[determined:])
    return leaked, reacted


@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("name", list(PREDICTORS))
def test_scores_do_not_depend_on_what_a_predictor_may_not_see(
    name: str, horizon: int, fitted: dict[str, Predictor], batch: RoutingBatch
) -> None:
    leaked, reacted = leaks(fitted[name], batch, horizon)
    assert not leaked
    assert reacted == (name not in CONSTANT)


class Peeking(Predictor):
    """Sees one step too much: the layer right below at every horizon."""

    name = "peeking"

    def fit(self, dataset: TraceDataset, **_: Any) -> "Peeking":
        return self

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        hot = torch.zeros(*batch.expert_ids_TLK.shape[:2], batch.num_experts).scatter_(2, batch.expert_ids_TLK, 1.0)
        return torch.cat([torch.zeros_like(hot[:, :1]), hot[:, :-1]], dim=1)


def test_the_check_finds_a_predictor_that_sees_one_step_too_much(batch: RoutingBatch) -> None:
    assert leaks(Peeking(), batch, 1) == (False, True)
    assert leaks(Peeking(), batch, 2) == (True, True)


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_sequences_packed_together_score_as_they_do_alone(
    name: str, fitted: dict[str, Predictor], batch: RoutingBatch, dataset: TraceDataset
) -> None:
    stream = dataset.sequences("all", columns=("weights", "logits", "lookahead", "tokens"))
    alone = [
        fitted[name].predict_scores(RoutingBatch.from_sequences([next(stream)], dataset.spec), 2) for _ in range(3)
    ]
    torch.testing.assert_close(fitted[name].predict_scores(batch, 2), torch.cat(alone), atol=1e-5, rtol=1e-5)
