"""Any number of layers and experts, and sequences as short as one token."""

import numpy as np
import pytest
import torch

from speculation import RoutingBatch, create

LIMITS = {
    "rank_path": {"max_steps": 1},
    "token_transformer": {"max_steps": 1},
    "foresight": {"max_steps": 1},
}


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(1, 300, 3), (2, 5, 1), (5, 4, 4)])
@pytest.mark.parametrize("name", ["edge_table", "activation_lookup", "foresight", "rank_path", "token_transformer"])
def test_every_shape_is_scored_at_every_horizon_it_has(name: str, layers: int, experts: int, top_k: int, plant) -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, *rng.integers(1, 8, 9).tolist()]
    ids = [rng.random((length, layers, experts)).argsort(axis=2)[:, :, :top_k] for length in lengths]
    lookahead = [rng.normal(size=(length, min(3, layers), layers, experts)) for length in lengths]
    dataset = plant(ids, experts, token_ids=[rng.integers(0, 99, length) for length in lengths], lookahead=lookahead)
    predictor = create(name).fit(dataset, **LIMITS.get(name, {}))
    stream = dataset.sequences("all", columns=("lookahead", "tokens"))
    batch = RoutingBatch.from_sequences(list(stream), dataset.spec)
    for horizon in range(1, min(3, layers) + 1):
        scores = predictor.predict_scores(batch, horizon)
        assert scores.shape == (sum(lengths), layers, experts)
        assert torch.isfinite(scores).all()
