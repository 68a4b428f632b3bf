from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, RoutingShape
from speculation.foresight import Foresight
from speculation.lookahead import GateLookahead
from speculation.metrics import ranked_experts
from traces.reader import TraceDataset

SMALL = {"hidden_size": 32, "mlp_size": 32, "buckets": 64}


@pytest.fixture
def batch(dataset: TraceDataset) -> RoutingBatch:
    stream = dataset.sequences("test", columns=("lookahead", "tokens"))
    return RoutingBatch.from_sequences(list(stream), dataset.spec)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_an_untrained_one_ranks_as_the_lookahead_does(horizon: int, dataset: TraceDataset, batch: RoutingBatch) -> None:
    predictor = Foresight(**SMALL)
    predictor.shape_ = RoutingShape.of(dataset)
    predictor.module_ = predictor.build(predictor.shape_, torch.Generator().manual_seed(0))
    gate = GateLookahead().fit(dataset).predict_scores(batch, horizon)
    ours = predictor.predict_scores(batch, horizon)
    assert torch.equal(ranked_experts(ours)[:, horizon:], ranked_experts(gate)[:, horizon:])


def test_training_corrects_the_lookahead_from_the_routing_so_far(dataset: TraceDataset, batch: RoutingBatch) -> None:
    predictor = Foresight(**SMALL).fit(dataset, max_steps=40, batch_size=8)
    gate = GateLookahead().fit(dataset)

    def recall(scores_TLE: torch.Tensor, first: int) -> float:
        best_TLK = scores_TLE.topk(2, dim=2).indices
        hits = (best_TLK[..., None] == batch.expert_ids_TLK[:, :, None]).any(dim=3)
        return float(hits[:, first:].float().mean())

    for horizon in (2, 3):  # where the lookahead is noisy
        ours, theirs = predictor.predict_scores(batch, horizon), gate.predict_scores(batch, horizon)
        assert recall(ours, horizon) > recall(theirs, horizon) + 0.02


def test_it_serves_the_horizons_that_traces_have_lookahead_of(dataset: TraceDataset, batch: RoutingBatch) -> None:
    assert batch.lookahead_logits_THLE is not None
    predictor = Foresight(**SMALL).fit(dataset, max_steps=2)
    near = replace(batch, lookahead_logits_THLE=batch.lookahead_logits_THLE[:, :1])
    assert torch.equal(predictor.predict_scores(near), predictor.predict_scores(batch))
    with pytest.raises(ConfigurationError, match="--horizon 2: the traces hold lookahead logits of 1 horizons"):
        predictor.predict_scores(near, 2)
    predictor.logits(near, 3, torch.Generator())  # a training step takes the longest there is
    with pytest.raises(ConfigurationError, match="read without lookahead logits"):
        predictor.predict_scores(replace(batch, lookahead_logits_THLE=None))


def test_traces_without_lookahead_are_refused(make_traces, tmp_path: Path) -> None:
    bare = TraceDataset(make_traces(sequences=12))
    with pytest.raises(ConfigurationError, match=r"foresight requires the column 'lookahead'.*--store weights,lookah"):
        Foresight().fit(bare)


def test_token_ids_help_where_they_are_and_may_be_missing(dataset: TraceDataset, batch: RoutingBatch) -> None:
    predictor = Foresight(**SMALL).fit(dataset, max_steps=2)
    assert predictor.sees(dataset.available) == ["ids", "lookahead", "tokens"]
    without = predictor.predict_scores(replace(batch, token_ids_T=None))
    assert not torch.equal(without, predictor.predict_scores(batch))
    predictor.uses = frozenset()
    assert torch.equal(without, predictor.predict_scores(batch))
