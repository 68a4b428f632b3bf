import numpy as np
import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, create
from speculation.peers import activation_lookup
from speculation.peers.activation_lookup import ActivationLookup


def request(rng: np.random.Generator, topic: int, tokens: int = 12) -> np.ndarray:
    """Every layer chooses two of the four experts of the request's topic."""
    return 4 * topic + rng.random((tokens, 3, 4)).argsort(axis=2)[:, :, :2]


def test_a_request_is_recognised_by_its_first_choices(plant) -> None:
    rng = np.random.default_rng(0)
    dataset = plant([request(rng, number % 3) for number in range(40)], 12)
    predictor = ActivationLookup(capacity=6).fit(dataset)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    for horizon in (1, 3):
        topic_TLX = predictor.predict_scores(batch, horizon).topk(4, dim=2).indices // 4
        right_SL = (topic_TLX == batch.expert_ids_TLK[:, :, :1] // 4).all(dim=2).flatten()
        first_S = torch.zeros_like(right_SL)
        for start in batch.offsets[:-1].tolist():
            first_S[3 * start : 3 * start + horizon] = True
        assert right_SL[~first_S].all()
        assert not right_SL[first_S].all()


def test_it_finds_what_comparing_every_matrix_at_every_step_finds(plant, monkeypatch) -> None:
    rng = np.random.default_rng(1)
    dataset = plant([rng.random((9, 3, 6)).argsort(axis=2)[:, :, :2] for _ in range(20)], 6)
    predictor = ActivationLookup().fit(dataset)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("all"))[:2], dataset.spec)
    known_NX = predictor.matrices_NLE_[:-1].flatten(1).double().numpy()
    monkeypatch.setattr(activation_lookup, "CHUNK_TOKENS", 2)
    for horizon in (1, 3):
        scores = predictor.predict_scores(batch, horizon).flatten(0, 1)
        for start in (0, 27):
            partial_X = np.zeros(18)
            for step in range(horizon, 27):
                seen = start + step - horizon
                layer = seen % 3
                partial_X[6 * layer + batch.expert_ids_TLK.flatten(0, 1)[seen].numpy()] += 1
                cosine_N = known_NX @ partial_X / np.linalg.norm(known_NX, axis=1) / np.linalg.norm(partial_X)
                expected_E = predictor.matrices_NLE_[cosine_N.argmax(), step % 3]
                assert torch.equal(scores[start + step], expected_E)


def test_collection_and_reservoir_are_bounded_and_the_last_matrix_is_the_mean(plant) -> None:
    rng = np.random.default_rng(2)
    dataset = plant([request(rng, number % 3) for number in range(40)], 12)
    predictor = ActivationLookup(capacity=5, max_requests=8).fit(dataset)
    assert len(predictor.matrices_NLE_) == 6
    matrices = [
        np.stack([np.bincount(s.expert_ids_TLK[:, layer].ravel(), minlength=12) / 24 for layer in range(3)])
        for s in dataset.sequences("train")
    ]
    np.testing.assert_allclose(predictor.matrices_NLE_[-1].numpy(), np.mean(matrices, axis=0), atol=1e-6)


def test_a_capacity_above_the_reservoir_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="capacity 9: must be 1 to max_requests 8"):
        create("activation_lookup", capacity=9, max_requests=8)
