from dataclasses import replace

import numpy as np
import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, create
from speculation.peers.token_transformer import TokenTransformer
from traces.reader import TraceDataset

SMALL = {"buckets": 64, "hidden_size": 32, "num_blocks": 1, "num_heads": 2, "dropout": 0.0}


def test_it_learns_experts_that_follow_from_this_token_the_one_before_and_the_topic(plant) -> None:
    rng = np.random.default_rng(0)
    tokens, ids = [], []
    for _ in range(60):
        topic, length = rng.integers(2), 30
        tokens_T = np.where(rng.random(length) < 0.5, rng.integers(0, 4, length), 4 + topic)
        before_T = np.concatenate([[0], tokens_T[:-1]])  # layer 0 is scored before its token is known
        tokens.append(tokens_T)
        ids.append(np.stack([before_T, tokens_T, np.full(length, topic)], axis=1)[:, :, None])
    dataset = plant(ids, 6, token_ids=tokens)
    predictor = TokenTransformer(**SMALL).fit(dataset, max_steps=80, learning_rate=5e-3)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    hits_TL = predictor.predict_scores(batch).argmax(dim=2) == batch.expert_ids_TLK[:, :, 0]
    starts_T = torch.repeat_interleave(batch.offsets[:-1], batch.sequence_lengths)
    later_T = torch.arange(batch.num_tokens) - starts_T > 5  # by then the topic has shown
    assert hits_TL[later_T].float().mean(dim=0).min() > 0.8


def test_it_sees_token_ids_and_no_routing(dataset: TraceDataset) -> None:
    predictor = TokenTransformer(**SMALL).fit(dataset, max_steps=3)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    assert batch.token_ids_T is not None
    scores = predictor.predict_scores(batch)
    assert torch.equal(scores, predictor.predict_scores(replace(batch, expert_ids_TLK=batch.expert_ids_TLK.flip(0))))
    assert not torch.equal(scores, predictor.predict_scores(replace(batch, token_ids_T=batch.token_ids_T.flip(0))))


def test_traces_without_tokens_are_refused(plant, dataset: TraceDataset) -> None:
    bare = plant([np.zeros((5, 2, 1), dtype=int)] * 3, 2, strings=False)
    with pytest.raises(ConfigurationError, match="token_transformer requires the column 'tokens'"):
        TokenTransformer().fit(bare)
    predictor = TokenTransformer(**SMALL).fit(dataset, max_steps=1)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    with pytest.raises(ConfigurationError, match="read without tokens"):
        predictor.predict_scores(replace(batch, token_ids_T=None))


def test_a_hidden_size_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hidden_size 10 is no multiple of num_heads 4"):
        create("token_transformer", hidden_size=10)
