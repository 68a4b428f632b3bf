"""`statistics`: counts that merge, estimates that equal least squares done by hand, and weights that use both."""

import dataclasses
from pathlib import Path

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, create, load_predictor
from speculation.features import multi_hot, packed_batches
from speculation.metrics import token_values
from speculation.predictor import RoutingShape
from speculation.statistics.counts import MAX_PAIRS, MAX_TOKEN_ENTRIES, StatisticsCounts
from speculation.statistics.predictor import Statistics
from speculation.statistics.tables import StatisticsTables
from traces.reader import TraceDataset


@pytest.fixture(scope="module")
def fitted(dataset: TraceDataset) -> Statistics:
    return Statistics().fit(dataset)


@pytest.fixture(scope="module")
def batch(dataset: TraceDataset) -> RoutingBatch:
    return RoutingBatch.from_sequences(list(dataset.sequences("test", columns=("tokens",))), dataset.spec)


def counts_of(dataset: TraceDataset, max_tokens: int) -> list[StatisticsCounts]:
    parts = []
    for _, batch in packed_batches(dataset.sequences("train", columns=("tokens",)), dataset.spec, max_tokens):
        parts.append(StatisticsCounts.zeros(RoutingShape.of(dataset), tokens=True))
        parts[-1].add(batch)
    return parts


def recall(scores: torch.Tensor, batch: RoutingBatch) -> float:
    return float(token_values(scores, batch, [f"recall@{batch.expert_ids_TLK.shape[2]}"])[:, 1:].mean())


def test_pairs_are_counted_in_decoding_order_and_not_across_sequences() -> None:
    # Two tokens and one: with L = 2 the step before layer 0 is layer 1 of the token before.
    ids = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 1], [0, 1]]])
    counts = StatisticsCounts.zeros(RoutingShape(2, 4, 2), tokens=True)
    counts.add(RoutingBatch(ids, None, None, None, torch.tensor([7, 7, 9]), torch.tensor([0, 2, 3]), 4))
    assert counts.reach == 2
    assert counts.pairs_LDEE[0, 0].diagonal().tolist() == [2, 2, 1, 1]
    assert counts.pairs_LDEE[0, 0, 0].tolist() == [2, 1, 1, 0]  # chosen together with expert 0
    assert counts.pairs_LDEE[1, 1, 0].tolist() == [0, 1, 1, 2]  # from 0 at layer 0 to layer 1 of the same token
    assert counts.pairs_LDEE[0, 1, 2].tolist() == [1, 0, 1, 0]  # from 2 at layer 1 to layer 0 of the next token
    assert counts.pairs_LDEE[0, 2].sum() == 4  # the second sequence has no token before
    assert int(counts.tokens_BLE.sum()) == 12
    assert sorted(counts.tokens_BLE[:, 0].sum(dim=1).tolist())[-2:] == [2, 4]


def test_counts_of_parts_merge_to_the_counts_of_the_whole(dataset: TraceDataset) -> None:
    (whole,) = counts_of(dataset, 1 << 20)
    parts = counts_of(dataset, 50)
    assert len(parts) > 5
    for part in parts[1:]:
        parts[0].merge(part)
    assert torch.equal(parts[0].pairs_LDEE, whole.pairs_LDEE)
    assert torch.equal(parts[0].tokens_BLE, whole.tokens_BLE)
    assert parts[0].observed == whole.observed


@pytest.mark.parametrize("shape", [RoutingShape(61, 256, 8), RoutingShape(24, 32, 4), RoutingShape(48, 128, 8)])
def test_memory_of_counts_is_bounded_whatever_the_model(shape: RoutingShape) -> None:
    counts = StatisticsCounts.zeros(shape, tokens=True)
    assert counts.pairs_LDEE.numel() <= MAX_PAIRS
    assert counts.tokens_BLE.numel() <= MAX_TOKEN_ENTRIES
    assert 3 <= counts.reach <= shape.num_layers


def test_the_linear_estimate_is_least_squares_on_the_experts_chosen_before() -> None:
    # One long sequence, so that sequence starts do not matter; layer 1 is explained by layer 0 and the token before.
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(4000, 2, 4, generator=generator).argsort(dim=2)[:, :, :2]
    ids[:, 1] = ids[:, 0].roll(1, dims=1)
    ids[1::2, 1] = ids[0:-1:2, 1]
    counts = StatisticsCounts.zeros(RoutingShape(2, 4, 2), tokens=False)
    counts.add(RoutingBatch(ids, None, None, None, None, torch.tensor([0, 4000]), 4))
    tables = StatisticsTables.of(counts, 2)
    hot = multi_hot(ids, 4).double()
    sources = torch.cat([hot[:-1, 1], hot[1:, 0]], dim=1)  # the token before at layer 1, this token at layer 0
    solution = torch.linalg.lstsq(
        torch.cat([sources, torch.ones(len(sources), 1, dtype=torch.float64)], dim=1), hot[1:, 1], driver="gelsd"
    ).solution
    expected = torch.cat([sources, torch.ones(len(sources), 1, dtype=torch.float64)], dim=1) @ solution
    found = tables.usage_LE[1] + torch.einsum("tnx,nxe->te", sources.view(-1, 2, 4).float(), tables.linear[0][1, :, :4])
    assert (found - expected).abs().max() < 0.06  # the pull towards usage: 200 of 4000 observations, halved by K / E
    assert (found - tables.usage_LE[1]).abs().mean() > 0.1


def test_it_learns_both_rules_of_the_generator_better_than_markov_and_repeat(
    fitted: Statistics, dataset: TraceDataset, batch: RoutingBatch
) -> None:
    ours = recall(fitted.predict_scores(batch), batch)
    for name in ("markov", "repeat", "frequency"):
        assert ours > recall(create(name).fit(dataset).predict_scores(batch), batch) + 0.05


def test_scores_are_calibrated_log_odds(fitted: Statistics, batch: RoutingBatch) -> None:
    probability = torch.sigmoid(fitted.predict_scores(batch))
    assert float(probability.sum(dim=2).mean()) == pytest.approx(2, abs=0.1)
    chosen = multi_hot(batch.expert_ids_TLK, 8)
    sure = probability > 0.8
    assert float(chosen[sure].mean()) == pytest.approx(float(probability[sure].mean()), abs=0.1)


def test_a_model_fitted_with_tokens_serves_text_without_and_unknown_tokens_change_nothing_below_the_horizon(
    fitted: Statistics, dataset: TraceDataset, batch: RoutingBatch
) -> None:
    assert fitted.sees(dataset.available) == ["ids", "tokens"]
    without = fitted.predict_scores(dataclasses.replace(batch, token_ids_T=None), 2)
    with_tokens = fitted.predict_scores(batch, 2)
    torch.testing.assert_close(without[:, :2], with_tokens[:, :2])
    assert not torch.allclose(without[:, 2:], with_tokens[:, 2:])
    ids_only = Statistics(tokens=False).fit(dataset)
    assert ids_only.sees(dataset.available) == ["ids"]
    torch.testing.assert_close(
        ids_only.predict_scores(batch), ids_only.predict_scores(dataclasses.replace(batch, token_ids_T=None))
    )
    assert recall(without, batch) > 0.3


def test_tokens_further_back_than_the_window_do_not_vote(dataset: TraceDataset, batch: RoutingBatch) -> None:
    near, far = Statistics(window=1).fit(dataset), Statistics(window=1000).fit(dataset)
    far.window = 1
    torch.testing.assert_close(far.tables_.linear[0], near.tables_.linear[0])
    for name, weights in near.combination_.items():
        far.combination_[name] = weights
    torch.testing.assert_close(far.predict_scores(batch), near.predict_scores(batch))
    far.window = 1000
    assert not torch.allclose(far.predict_scores(batch), near.predict_scores(batch))


def test_live_scores_equal_the_batch_scores_past_the_window(fitted: Statistics, dataset: TraceDataset) -> None:
    short = Statistics(window=5)
    short.shape_, short.tables_, short.combination_ = fitted.shape_, fitted.tables_, fitted.combination_
    ids = torch.cat(
        [s.expert_ids_TLK for s in (RoutingBatch.from_sequences(list(dataset.sequences("train", ())), dataset.spec),)]
    )
    ids = ids[:700]  # longer than what is kept beside the window, so that old tokens are dropped
    batch = RoutingBatch(ids, None, None, None, None, torch.tensor([0, len(ids)]), 8)
    expected = short.predict_scores(batch, 2).flatten(0, 1)
    state = short.start()
    for step, ids_K in enumerate(ids.flatten(0, 1)):
        if step % 4 == 0:
            state.begin_token()
        if step % 7 == 0 and step + 1 < len(expected):
            torch.testing.assert_close(short.predict_next(state, 2), expected[step + 1], atol=1e-4, rtol=1e-4)
        state.observe(ids_K)


def test_one_sequence_is_enough_and_none_is_refused(dataset: TraceDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no sequence to count"):
        Statistics().fit(dataset, hold_out=dataset.datasets)
    with pytest.raises(ConfigurationError, match="window 0"):
        Statistics(window=0)
    fitted = Statistics(tokens=False, window=9).fit(dataset)
    fitted.save_pretrained(tmp_path)
    loaded = load_predictor(tmp_path)
    assert loaded.options() == {"tokens": False, "window": 9}
