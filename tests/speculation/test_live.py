"""Live use: one token and one layer at a time, with the scores that the batch gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from speculation import PREDICTORS, Predictor, RoutingBatch, create
from speculation.live import LiveState
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset

FEW_STEPS = {"max_steps": 2}
TOLERANCE = 1e-4  # sums in another order; scores are logits or probabilities of size 1 to 20


def fit_limits(name: str) -> dict[str, Any]:
    from speculation.neural import NeuralPredictor

    return FEW_STEPS if issubclass(PREDICTORS[name], NeuralPredictor) else {}


@pytest.fixture(scope="module")
def batch(dataset: TraceDataset) -> RoutingBatch:
    stream = dataset.sequences("test", columns=("weights", "logits", "lookahead", "tokens"))
    return RoutingBatch.from_sequences([next(stream)], dataset.spec)


def follow(predictor: Predictor, batch: RoutingBatch, horizon: int, from_step: int = 0) -> torch.Tensor:
    """Live scores of all steps from a step on, while the batch's one sequence is decoded: (steps, E)."""
    state = predictor.start()
    scores = []
    tokens, layers, _ = batch.expert_ids_TLK.shape
    for step in range(tokens * layers):
        token, layer = divmod(step, layers)
        if layer == 0:
            state.begin_token(None if batch.token_ids_T is None else int(batch.token_ids_T[token]))
        if from_step <= step + horizon - 1 < tokens * layers:
            scores.append(predictor.predict_next(state, horizon))
        weights, lookahead = batch.routing_weights_TLK, None
        if batch.lookahead_logits_THLE is not None:
            lookahead = torch.zeros(3, batch.num_experts)
            for above in range(1, min(3, layers - 1 - layer) + 1):
                lookahead[above - 1] = batch.lookahead_logits_THLE[token, above - 1, layer + above]
        state.observe(batch.expert_ids_TLK[token, layer], None if weights is None else weights[token, layer], lookahead)
    return torch.stack(scores)


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_live_scores_equal_the_batch_scores_at_every_horizon(
    name: str, dataset: TraceDataset, batch: RoutingBatch
) -> None:
    predictor = create(name).fit(dataset, **fit_limits(name))
    for horizon in (1, 2, 3):
        expected = predictor.predict_scores(batch, horizon).flatten(0, 1)
        first = horizon - 1
        torch.testing.assert_close(follow(predictor, batch, horizon), expected[first:], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"path_size": 8, "tokens": True, "window": 5, "reach": 2},
        {"copy_heads": 0, "context_size": 0, "weights": False},
        {"copy_heads": 1, "decays": [0.9]},
    ],
)
def test_every_part_of_interlayer_is_live_and_a_horizon_can_be_asked_for_late(
    options: dict[str, Any], dataset: TraceDataset, batch: RoutingBatch
) -> None:
    small = {"hidden_size": 16, "mlp_size": 16, "copy_key_size": 8, "context_size": 16}
    predictor = create("interlayer", **{**small, **options}).fit(dataset, max_steps=3)
    for horizon in (1, 3):
        expected = predictor.predict_scores(batch, horizon).flatten(0, 1)
        late = 2 * batch.num_layers + 1
        found = follow(predictor, batch, horizon, from_step=late)
        torch.testing.assert_close(found, expected[max(late, horizon - 1) :], atol=TOLERANCE, rtol=TOLERANCE)


def test_interlayer_is_live_beyond_the_tokens_whose_sets_it_keeps(dataset: TraceDataset) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(40, 4, 8, generator=generator).argsort(dim=2)[:, :, :2]
    long = RoutingBatch(ids, None, None, None, None, torch.tensor([0, 40]), 8)
    predictor = create("interlayer", hidden_size=16, window=6).fit(dataset, max_steps=1)
    expected = predictor.predict_scores(long, 2).flatten(0, 1)
    torch.testing.assert_close(follow(predictor, long, 2), expected[1:], atol=TOLERANCE, rtol=TOLERANCE)


def test_asking_twice_gives_the_same_and_a_state_serves_several_horizons(
    dataset: TraceDataset, batch: RoutingBatch
) -> None:
    predictor = create("interlayer", hidden_size=16).fit(dataset, max_steps=1)
    state = predictor.start()
    state.begin_token()
    state.observe(batch.expert_ids_TLK[0, 0])
    first = predictor.predict_next(state, 1)
    predictor.predict_next(state, 3)
    assert torch.equal(predictor.predict_next(state, 1), first)
    shown = replace(batch, routing_weights_TLK=None, token_ids_T=None)
    torch.testing.assert_close(first, predictor.predict_scores(shown)[0, 1], atol=TOLERANCE, rtol=TOLERANCE)


def test_wrong_use_is_refused_in_words() -> None:
    state = LiveState(RoutingShape(2, 8, 2))
    with pytest.raises(ValueError, match="call begin_token first"):
        state.observe([1, 2])
    state.begin_token(7)
    with pytest.raises(ValueError, match=r"expert ids of shape \(3,\), wanted \(2,\)"):
        state.observe([1, 2, 3])
    state.observe([1, 2], [0.7, 0.3])
    with pytest.raises(ValueError, match="routing weights must be given at every layer or at none"):
        state.observe([1, 2])
    with pytest.raises(ValueError, match="observed at 1 of 2 layers"):
        state.begin_token(8)
