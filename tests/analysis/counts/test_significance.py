"""Shuffled counts against counting every permutation anew; q-values against the procedure as it is written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.counts import significance
from analysis.counts.significance import Moments, ShuffledCounts, benjamini_hochberg


def test_shuffled_counts_equal_those_of_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "BATCH_SEQUENCES", 4)
    monkeypatch.setattr(significance, "BLOCK_NUMBERS", 40)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 11)
    counts_SN = rng.integers(0, 9, (11, 2, 4))
    shuffled = ShuffledCounts(labels.tolist(), 3, (2, 4), permutations=7, seed=5)
    for counts in counts_SN:
        shuffled.add(counts, 30)
    blocks = list(shuffled.blocks())
    assert len(blocks) > 1
    again = np.random.default_rng(5)
    for found in np.concatenate(blocks):
        permuted = again.permutation(labels)
        np.testing.assert_array_equal(found, [counts_SN[permuted == label].sum(axis=0) for label in range(3)])


def test_fewer_permutations_are_made_where_memory_would_not_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "NULL_BYTES", 4 * 2 * 10 * 33)
    assert ShuffledCounts([0, 1], 2, (10,), permutations=1000, seed=0).permutations == 33
    assert ShuffledCounts([0, 1], 2, (10_000,), permutations=1000, seed=0).permutations == 20
    assert ShuffledCounts([0, 0], 1, (10,), permutations=1000, seed=0).permutations == 0


def test_more_sequences_than_labels_are_refused() -> None:
    shuffled = ShuffledCounts([0, 1], 2, (1,), permutations=3, seed=0)
    for _ in range(2):
        shuffled.add(np.ones(1, dtype=np.int64), 1)
    with pytest.raises(ValueError, match="than the 2 announced"):
        shuffled.add(np.ones(1, dtype=np.int64), 1)


def test_moments_over_blocks_are_those_of_all_values_at_once() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(200, 3, 4)) + 50
    values[:, 0, 0] = 7
    moving = np.ones((3, 4), dtype=bool)
    moving[0, 0] = False
    found = Moments.of([values[:30], values[30:31], values[31:]])
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose(found.deviation, values.std(axis=0, ddof=1))
    np.testing.assert_allclose(found.skewness[moving], stats.skew(values[:, moving]))
    np.testing.assert_allclose(found.kurtosis[moving], stats.kurtosis(values[:, moving]))
    assert (found.permutations, found.skewness[0, 0], found.kurtosis[0, 0]) == (200, 0, 0)
    assert found.two_sided(np.full((3, 4), 7.0))[0, 0] == 1
    assert found.two_sided(np.full((3, 4), 8.0))[0, 0] == 0
    at = found.mean + 2.5 * found.deviation
    expected = stats.pearson3.sf(2.5, np.maximum(found.skewness[moving], 0.02))
    np.testing.assert_allclose(found.upper(at)[moving], expected, rtol=1e-6)


def skewed_counts(rng: np.random.Generator) -> np.ndarray:
    """Counts of 100 sequences [S, 2, 150]: experts in common use, and rare ones that single texts use in bursts."""
    common = rng.poisson(rng.gamma(4.0, 10.0, (100, 1, 150)))
    rare = rng.poisson(rng.gamma(0.3, 1.0, (100, 1, 150)))
    return np.concatenate([common, rare], axis=1)


def shuffled_differences(counts: np.ndarray, labels: np.ndarray, permutations: int, seed: int) -> list[np.ndarray]:
    shuffled = ShuffledCounts(labels.tolist(), 3, counts.shape[1:], permutations, seed)
    for each in counts:
        shuffled.add(each, 1000)
    means = [block / np.bincount(labels)[:, None, None] for block in shuffled.blocks()]
    return [each - each.mean(axis=1, keepdims=True) for each in means]


@pytest.mark.parametrize(("kind", "most"), [(0, 1.6), (1, 2.5)])
def test_without_an_effect_p_is_as_small_as_often_as_it_says_also_for_rare_experts_and_four_sequences(
    kind: int, most: float
) -> None:
    labels = np.repeat([0, 1, 2], [48, 48, 4])
    p = []
    for seed in range(5):
        counts = skewed_counts(np.random.default_rng(seed))
        moments = Moments.of(shuffled_differences(counts, labels, 400, seed))
        p += [
            moments.two_sided(each) for block in shuffled_differences(counts, labels, 100, 99 + seed) for each in block
        ]
    found = np.array(p)[:, :, kind]  # [500, D, E]
    for label in range(3):
        assert (found[:, label] < 0.05).mean() == pytest.approx(0.05, rel=0.35)
        assert 0.006 < (found[:, label] < 0.01).mean() < 0.01 * most


def test_one_cell_among_thousands_is_found_with_fewer_permutations_than_cells() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], 40))
    counts = rng.poisson(rng.gamma(4.0, 5.0, (120, 2, 1000)))
    counts[labels == 1, 1, 7] += 20
    moments = Moments.of(shuffled_differences(counts, labels, 300, 0))
    means = np.stack([counts[labels == label].mean(axis=0) for label in range(3)])
    q = benjamini_hochberg(moments.two_sided(means - means.mean(axis=0)))
    assert q[1, 1, 7] < 0.001
    assert (q < 0.05).sum() <= 6  # those of the other data sets' lower use, and few by chance
    assert benjamini_hochberg(np.maximum(moments.two_sided(means - means.mean(axis=0)), 1 / 301)).min() > 0.05


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_rejecting_q_below_alpha_is_the_step_up_procedure(p: list[float], alpha: float) -> None:
    q = benjamini_hochberg(np.array(p))
    ordered = sorted(p)
    passing = [rank for rank, each in enumerate(ordered, start=1) if each <= alpha * rank / len(p) * (1 - 1e-9)]
    cut = ordered[passing[-1] - 1] if passing else -1.0
    for each, found in zip(p, q, strict=True):
        if each <= cut:
            assert found <= alpha
        elif found < alpha * (1 - 1e-6):
            raise AssertionError((each, found, cut))


def test_unknown_p_values_stay_unknown_and_do_not_count_as_tests() -> None:
    q = benjamini_hochberg(np.array([0.01, np.nan, 0.04]))
    assert q[0] == pytest.approx(0.02)
    assert np.isnan(q[1])
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()
