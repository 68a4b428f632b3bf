from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, create
from speculation.counted import Markov
from speculation.peers.edge_table import SMOOTHING, EdgeTable


def sums_of_two_layers(rng: np.random.Generator, tokens: int = 40) -> np.ndarray:
    """Layer 2 chooses the sum of what layers 0 and 1 chose, modulo 5: neither alone says anything of it."""
    ids = rng.integers(0, 5, (tokens, 3, 1))
    ids[:, 2] = (ids[:, 0] + ids[:, 1]) % 5
    return ids


def recall_at_1(predictor, batch: RoutingBatch, layer: int) -> float:
    best_T = predictor.predict_scores(batch)[:, layer].argmax(dim=1)
    return float((best_T == batch.expert_ids_TLK[:, layer, 0]).float().mean())


def test_it_learns_what_takes_two_layers_to_know(plant) -> None:
    rng = np.random.default_rng(0)
    dataset = plant([sums_of_two_layers(rng) for _ in range(30)], 5)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    assert recall_at_1(EdgeTable().fit(dataset), batch, 2) == 1.0
    assert recall_at_1(Markov().fit(dataset), batch, 2) < 0.5


def test_scores_are_the_shrunk_counts_of_the_definition(plant) -> None:
    rng = np.random.default_rng(1)
    ids = [rng.random((12, 3, 4)).argsort(axis=2)[:, :, :2] for _ in range(8)]
    dataset = plant(ids, 4)
    predictor = EdgeTable().fit(dataset)
    pairs, singles, usage = Counter(), Counter(), Counter()
    for sequence in dataset.sequences("train"):
        steps = sequence.expert_ids_TLK.reshape(-1, 2).tolist()
        for step, chosen in enumerate(steps):
            usage.update(chosen if step % 3 == 1 else ())
            if step % 3 == 1 and step >= 2:
                singles.update(product(steps[step - 2], chosen))
            if step % 3 == 1 and step >= 3:
                pairs.update(product(steps[step - 2], steps[step - 3], chosen))
    batch = RoutingBatch.from_sequences(list(dataset.sequences("all"))[:1], dataset.spec)
    steps = batch.expert_ids_TLK.flatten(0, 1).tolist()
    step, horizon = 7, 2  # token 2 at layer 1
    expected = np.zeros(4)
    for near, far in product(steps[step - horizon], steps[step - horizon - 1]):
        seen = sum(pairs[near, far, target] for target in range(4))
        below = sum(singles[near, target] for target in range(4))
        for target in range(4):
            single = (singles[near, target] + SMOOTHING * usage[target] / usage.total()) / (below + SMOOTHING)
            expected[target] += (pairs[near, far, target] + SMOOTHING * single) / (seen + SMOOTHING) / 4
    scores = predictor.predict_scores(batch, horizon).flatten(0, 1)
    torch.testing.assert_close(scores[step], torch.from_numpy(expected).float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(len(steps)), atol=2e-3, rtol=0)
    torch.testing.assert_close(scores[1], predictor.frequency_LE_[1])  # no step is known yet


def test_a_small_limit_makes_pairs_share_rows_and_still_beats_frequency(plant) -> None:
    rng = np.random.default_rng(2)
    dataset = plant([sums_of_two_layers(rng) for _ in range(30)], 5)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    rows = 12
    small = EdgeTable(table_mb=2 * 5 * 3 * 3 * rows / 2**20).fit(dataset)
    assert small.pairs_HLRE_.shape == (3, 3, rows, 5)
    assert 0.3 < recall_at_1(small, batch, 2) < 1.0


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="table_mb 0: must be above 0"):
        create("edge_table", table_mb=0)
