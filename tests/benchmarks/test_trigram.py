import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from trigram import Trigram


@pytest.fixture(scope="module")
def model():
    generator = np.random.default_rng(0)
    return Trigram([generator.integers(0, 7, 50).astype(np.int32) for _ in range(20)], 7)


@pytest.mark.parametrize("history", [[0, 1], [3, 3], [6, 2]])
def test_probabilities_of_the_next_token_sum_to_one(model, history):
    total = sum(np.exp(model.log_probabilities(np.array([*history, token], np.int32))[-1]) for token in range(7))
    assert total == pytest.approx(1.0)


def test_a_repeated_pattern_becomes_predictable():
    pattern = np.tile(np.arange(5, dtype=np.int32), 40)
    assert np.exp(Trigram([pattern], 5).log_probabilities(pattern)[2:]).min() > 0.9
