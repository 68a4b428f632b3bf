import numpy as np
import pytest

from speculation import bootstrap
from speculation.bootstrap import interval, resampled_means


def test_intervals_cover_the_true_mean_about_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        means = rng.normal(0.5, 0.1, 60)
        tokens = rng.integers(50, 100, 60).astype(float)
        found = interval(0.5, resampled_means((means * tokens)[:, None], tokens, 400, seed)[:, 0])
        covered += found["low"] <= 0.5 <= found["high"]
    assert 178 <= covered <= 198


def test_long_sequences_weigh_as_much_as_their_tokens() -> None:
    samples = resampled_means(np.array([[90.0], [0.0]]), np.array([90.0, 10.0]), 2000, 0)[:, 0]
    assert set(np.round(samples, 6)) == {0.0, 0.9, 1.0}
    assert np.mean(samples == 0.9) == pytest.approx(0.5, abs=0.05)


def test_resamples_are_paired_and_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, tokens = np.random.default_rng(1).random((7, 3)), np.ones(7)
    whole = resampled_means(sums, tokens, 50, 5)
    assert np.allclose(resampled_means(sums[:, :1] + 1, tokens, 50, 5), whole[:, :1] + 1)
    monkeypatch.setattr(bootstrap, "CHUNK_WEIGHTS", 14)
    assert np.allclose(resampled_means(sums, tokens, 50, 5), whole)


def test_without_resamples_the_interval_is_the_value() -> None:
    assert resampled_means(np.ones((3, 2)), np.ones(3), 0, 0).shape == (0, 2)
    assert interval(0.25, np.empty(0)) == {"value": 0.25, "low": 0.25, "high": 0.25}
