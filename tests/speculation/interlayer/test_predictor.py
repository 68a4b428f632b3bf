from dataclasses import replace
from typing import Any

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import Predictor, RoutingBatch, create
from speculation.counted import count_routing
from speculation.interlayer.predictor import InterLayer
from speculation.metrics import token_values
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset

SMALL = {"hidden_size": 16, "mlp_size": 16, "copy_key_size": 8, "context_size": 16}
PARTS: list[dict[str, Any]] = [
    {},
    {"path_size": 8, "reach": 3},
    {"tokens": True},
    {"copy_heads": 0, "context_size": 0},
    {"weights": False, "copy_heads": 1, "window": 4},
]


def untrained(shape: RoutingShape, **options: Any) -> InterLayer:
    """A predictor whose weights are random, those that start at zero too."""
    predictor = InterLayer(**{**SMALL, **options})
    predictor.shape_ = shape
    predictor.module_ = predictor.build(shape, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.module_.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return predictor


def random_batch(shape: RoutingShape, lengths: list[int], seed: int = 0) -> RoutingBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    draw = torch.rand(tokens, shape.num_layers, shape.num_experts, generator=generator)
    weights = torch.rand(tokens, shape.num_layers, shape.top_k, generator=generator)
    ids = torch.randint(0, 999, (tokens,), generator=generator)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return RoutingBatch(draw.argsort(dim=2)[:, :, : shape.top_k], weights, None, None, ids, offsets, shape.num_experts)


def recall(predictor: Predictor, dataset: TraceDataset) -> float:
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test", columns=("weights", "tokens"))), dataset.spec)
    return float(token_values(predictor.predict_scores(batch), batch, ["recall@2"])[5:, 1:].mean())


@pytest.fixture(scope="module")
def trained(dataset: TraceDataset) -> Predictor:
    options = {"hidden_size": 32, "mlp_size": 16, "context_size": 16, "copy_key_size": 8}
    return create("interlayer", **options).fit(dataset, epochs=6, batch_tokens=80)


def test_it_learns_a_rule_that_needs_the_layer_below_and_the_sequence(
    trained: Predictor, dataset: TraceDataset
) -> None:
    markov = create("markov").fit(dataset)
    assert recall(trained, dataset) > recall(markov, dataset) + 0.1
    # Nine times in ten the layer below tells the first expert, and the sequence always the second.
    assert recall(trained, dataset) > 0.85


def test_copy_attention_finds_what_was_chosen_where_the_layer_below_looked_the_same() -> None:
    """Every sequence has a permutation of its own from layer 0 to layer 1: no count over sequences can tell it."""
    shape = RoutingShape(2, 8, 1)
    generator = torch.Generator().manual_seed(0)
    permutation = torch.rand(30, 8, generator=generator).argsort(dim=1)
    below = torch.randint(0, 8, (30, 60), generator=generator)
    ids = torch.stack([below, permutation.gather(1, below)], dim=2).view(-1, 2, 1)
    batch = RoutingBatch(ids, None, None, None, None, torch.arange(0, 1801, 60), 8)
    predictor = untrained(shape, context_size=0, dropout=0.0)
    module = predictor.network
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for step in range(60):
        noise = torch.Generator().manual_seed(step)
        predictor.loss(predictor.logits(batch, 1, noise), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = replace(batch, expert_ids_TLK=torch.cat([ids[:60], (ids[:60] + torch.tensor([[0], [3]])) % 8]))
    other = replace(other, offsets=torch.tensor([0, 60, 120]))
    hits = predictor.predict_scores(other)[:, 1].argmax(dim=1) == other.expert_ids_TLK[:, 1, 0]
    assert hits.view(2, 60)[:, 30:].float().mean(dim=1).min() > 0.9


def test_an_untrained_model_starts_near_the_frequencies(dataset: TraceDataset) -> None:
    counts, shape = count_routing(dataset), RoutingShape.of(dataset)
    predictor = InterLayer()
    predictor.shape_ = shape
    predictor.module_ = predictor.build(shape, torch.Generator().manual_seed(0), counts)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    likely = predictor.predict_scores(batch).softmax(dim=2).mean(dim=0)
    torch.testing.assert_close(likely, counts.frequency_LE(), atol=0.1, rtol=0)


@pytest.mark.parametrize("options", PARTS)
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_no_part_sees_what_the_horizon_hides_and_each_reacts_to_the_step_before(
    options: dict[str, Any], horizon: int
) -> None:
    shape = RoutingShape(5, 8, 2)
    predictor = untrained(shape, **options)
    batch, other = random_batch(shape, [6, 11]), random_batch(shape, [6, 11], seed=1)
    before = predictor.predict_scores(batch, horizon)[6:].flatten(0, 1)
    reacted = 0
    for last_step in range(-1, 51, 4):
        hidden_TL = torch.ones(17, 5, dtype=torch.bool)
        hidden_TL[6:] = torch.arange(55).view(11, 5) > last_step
        hidden_T = hidden_TL[:, 0]
        changed = replace(
            batch,
            expert_ids_TLK=torch.where(hidden_TL[..., None], other.expert_ids_TLK, batch.expert_ids_TLK),
            routing_weights_TLK=torch.where(hidden_TL[..., None], torch.rand(17, 5, 2), batch.routing_weights_TLK),
            token_ids_T=torch.where(hidden_T, other.token_ids_T, batch.token_ids_T),
        )
        after = predictor.predict_scores(changed, horizon)[6:].flatten(0, 1)
        determined = last_step + horizon + 1
        assert torch.equal(before[:determined], after[:determined])
        reacted += int(not torch.equal(before[determined], after[determined]))
    assert reacted == 13


@pytest.mark.parametrize("options", PARTS)
def test_scores_do_not_depend_on_the_sequences_packed_together(options: dict[str, Any]) -> None:
    shape = RoutingShape(4, 8, 2)
    predictor = untrained(shape, **options)
    batch, alone = random_batch(shape, [5, 140, 3]), []
    for start, stop in ((0, 5), (5, 145), (145, 148)):
        parts = {name: value[start:stop] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        alone.append(predictor.predict_scores(replace(batch, **{**parts, "offsets": torch.tensor([0, stop - start])})))
    torch.testing.assert_close(predictor.predict_scores(batch), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_ids_alone_are_enough_for_a_model_trained_with_weights(trained: Predictor, dataset: TraceDataset) -> None:
    assert trained.sees(["ids", "weights", "tokens"]) == ["ids", "weights"]
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test", columns=("weights",))), dataset.spec)
    bare = replace(batch, routing_weights_TLK=None)
    recalls = [token_values(trained.predict_scores(each), each, ["recall@2"]).mean() for each in (batch, bare)]
    assert recalls[1] > recalls[0] - 0.05


def test_what_it_scores_does_not_depend_on_columns_it_was_trained_without(dataset: TraceDataset) -> None:
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test", columns=("weights", "tokens"))), dataset.spec)
    predictor = untrained(RoutingShape.of(dataset), weights=False)
    assert predictor.uses == frozenset()
    bare = replace(batch, routing_weights_TLK=None, token_ids_T=None)
    assert torch.equal(predictor.predict_scores(batch), predictor.predict_scores(bare))
    with_tokens = untrained(RoutingShape.of(dataset), tokens=True)
    assert with_tokens.uses == {"weights", "tokens"}
    assert not torch.equal(with_tokens.predict_scores(batch), with_tokens.predict_scores(bare))


@pytest.mark.parametrize(("layers", "reach"), [(1, 6), (2, 6), (4, 1)])
@pytest.mark.parametrize("options", PARTS)
def test_any_number_of_layers_and_any_reach_work_at_every_horizon(
    layers: int, reach: int, options: dict[str, Any]
) -> None:
    shape = RoutingShape(layers, 300, 3)
    predictor = untrained(shape, **{**options, "reach": reach})
    for horizon in range(1, min(3, layers) + 1):
        assert predictor.predict_scores(random_batch(shape, [5]), horizon).shape == (5, layers, 300)


@pytest.mark.parametrize("shape", [RoutingShape(24, 32, 4), RoutingShape(26, 64, 6)])
def test_the_default_has_at_most_six_million_parameters_on_the_models_it_is_measured_on(shape: RoutingShape) -> None:
    predictor = InterLayer()
    predictor.uses = frozenset({"weights"}) if shape.num_layers == 24 else frozenset()  # DeepSeek's traces have none
    module = predictor.build(shape, torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in module.parameters()) <= 6_000_000


def test_muon_trains_matrices_only_and_adamw_what_is_no_matrix() -> None:
    predictor = untrained(RoutingShape(4, 8, 2), path_size=8, tokens=True)
    names = set(predictor.muon_parameters(predictor.network))
    rest = {name for name, _ in predictor.network.named_parameters()} - names
    assert rest == {
        *("place_HLD", "recent_LR", "bias_LE", "token_BN", "copied_LH", "log_copied_LH"),
        *("copy.sharpness_LH", "copy.empty_LHD", "context.blocks.0.sharpness_H", "context.blocks.1.sharpness_H"),
    }


def test_options_that_do_not_fit_together_are_refused() -> None:
    for options, message in (
        ({"context_size": 10}, "context_size 10 is no multiple of context_heads 4"),
        ({"loss": "rank"}, "loss rank: unknown; choose one of set"),
        ({"loss": "ranks", "weights": False}, "loss ranks needs routing weights, but option weights is off"),
        ({"window": 0}, "window 0: must be at least 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            create("interlayer", **options)
