from dataclasses import replace

import numpy as np
import torch

from speculation import RoutingBatch
from speculation.peers.rank_path import RankPath
from traces.reader import TraceDataset


def test_it_learns_what_takes_the_ranks_of_two_layers_to_know(plant) -> None:
    rng = np.random.default_rng(0)
    ids = []
    for _ in range(40):
        ids_TLK = rng.random((30, 3, 4)).argsort(axis=2)[:, :, :2]
        ids_TLK[:, 2, 0] = (ids_TLK[:, 0, 0] + ids_TLK[:, 1, 1]) % 4  # a first rank and a second
        ids_TLK[:, 2, 1] = (ids_TLK[:, 2, 0] + 1) % 4
        ids.append(ids_TLK)
    dataset = plant(ids, 4)
    predictor = RankPath(hidden_size=64, dropout=0.0).fit(dataset, max_steps=150, learning_rate=5e-3)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    best_TK = predictor.predict_scores(batch)[:, 2].topk(2, dim=1).indices.sort(dim=1).values
    assert (best_TK == batch.expert_ids_TLK[:, 2].sort(dim=1).values).float().mean() > 0.95


def test_it_sees_nothing_of_earlier_tokens_and_works_without_weights(dataset: TraceDataset) -> None:
    predictor = RankPath(hidden_size=16).fit(dataset, max_steps=3)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    turned = replace(batch, expert_ids_TLK=batch.expert_ids_TLK.flip(0), routing_weights_TLK=None)
    scores, other = (predictor.predict_scores(each) for each in (replace(batch, routing_weights_TLK=None), turned))
    assert torch.equal(scores[:, 0], other[:, 0])  # nothing lies below layer 0
    assert not torch.equal(scores[:, 1], other[:, 1])
    later = torch.cat([batch.expert_ids_TLK[:1].roll(1, dims=2), batch.expert_ids_TLK[1:]])
    assert torch.equal(scores[1:], predictor.predict_scores(replace(turned, expert_ids_TLK=later))[1:])
    assert not torch.equal(scores, predictor.predict_scores(batch))
