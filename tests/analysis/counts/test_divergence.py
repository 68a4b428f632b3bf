"""Divergence of usage against scipy's, and the permutation test with and without an effect."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon

from analysis.counts.divergence import UsageDivergence, jensen_shannon_bits

COUNTS = arrays(np.int64, 6, elements=st.integers(0, 1000))


@given(COUNTS, COUNTS)
def test_the_divergence_is_scipys_and_lies_between_0_and_1(first: np.ndarray, second: np.ndarray) -> None:
    bits = float(jensen_shannon_bits(first, second))
    assert 0 <= bits <= 1 + 1e-12
    if first.sum() and second.sum():
        assert bits == pytest.approx(jensenshannon(first, second, base=2) ** 2, abs=1e-9)


def test_disjoint_use_is_one_bit() -> None:
    assert jensen_shannon_bits(np.array([3, 0]), np.array([0, 9])) == pytest.approx(1)


def drawn(rng: np.random.Generator, shares_E: np.ndarray, tokens: int = 60) -> np.ndarray:
    """Counts of one sequence in two layers; sequences differ more than their tokens do."""
    own_LE = rng.dirichlet(20 * shares_E, size=2)
    return np.stack([rng.multinomial(tokens, own_E) for own_E in own_LE])


EVEN = np.full(4, 0.25)
SKEWED = np.array([0.4, 0.2, 0.2, 0.2])


def test_counts_are_those_added_and_equal_pairs_diverge_by_nothing() -> None:
    rng = np.random.default_rng(0)
    usage = UsageDivergence(2, 4, (1, 2), permutations=20)
    pairs = [drawn(rng, EVEN) for _ in range(70)]  # more than one chunk
    alone = [(run, drawn(rng, EVEN)) for run in (1, 0, 1)]
    for counts_LE in pairs:
        usage.add_pair(counts_LE, counts_LE)
    for run, counts_LE in alone:
        usage.add_alone(run, counts_LE)
    for run in (0, 1):
        expected = sum(pairs) + sum(counts_LE for each, counts_LE in alone if each == run)
        np.testing.assert_array_equal(usage.counts_RLE[run], expected)
    found = usage.of_pairs()
    assert not found.bits_L.any()
    assert not found.difference_LE.any()
    assert (found.p_value_L == 1).all()
    assert usage.of_all().bits_L.all()
    with pytest.raises(ValueError, match="more sequences without a partner than the 3 announced"):
        usage.add_alone(0, pairs[0])


def test_relabelled_counts_equal_a_slow_relabelling() -> None:
    rng = np.random.default_rng(1)
    usage = UsageDivergence(2, 4, (3, 2), permutations=7, seed=5)
    pairs = [(drawn(rng, EVEN), drawn(rng, SKEWED)) for _ in range(5)]
    alone = [drawn(rng, EVEN) for _ in range(5)]
    for first_LE, second_LE in pairs:
        usage.add_pair(first_LE, second_LE)
    for place, counts_LE in enumerate(alone):
        usage.add_alone(int(place >= 3), counts_LE)
    again = np.random.default_rng(5)
    labels_PS = np.stack([again.permutation([False] * 3 + [True] * 2) for _ in range(7)])
    exchanged_NP = np.stack([again.random(7) < 0.5 for _ in pairs])
    bits_PL = []
    for permutation in range(7):
        first_LE, second_LE = np.zeros((2, 4)), np.zeros((2, 4))
        for (left, right), exchanged in zip(pairs, exchanged_NP[:, permutation], strict=True):
            first_LE, second_LE = first_LE + (right if exchanged else left), second_LE + (left if exchanged else right)
        for counts_LE, second in zip(alone, labels_PS[permutation], strict=True):
            first_LE, second_LE = first_LE + counts_LE * ~second, second_LE + counts_LE * second
        bits_PL.append([jensenshannon(first_LE[layer], second_LE[layer], base=2) ** 2 for layer in (0, 1)])
    np.testing.assert_allclose(usage.of_all().exchanged_mean_L, np.mean(bits_PL, axis=0))


@pytest.mark.parametrize("paired", [True, False])
def test_an_effect_is_found_and_the_null_is_found_about_as_often_as_alpha(paired: bool) -> None:
    rng = np.random.default_rng(2)

    def p_values(second_E: np.ndarray, sequences: int) -> np.ndarray:
        usage = UsageDivergence(
            2, 4, (0, 0) if paired else (sequences, sequences), permutations=99, seed=int(rng.integers(99))
        )
        for _ in range(sequences):
            first_LE, second_LE = drawn(rng, EVEN), drawn(rng, second_E)
            if paired:
                usage.add_pair(first_LE, second_LE)
            else:
                usage.add_alone(0, first_LE)
                usage.add_alone(1, second_LE)
        return usage.of_all().p_value_L

    assert (p_values(SKEWED, 60) <= 0.01).all()
    null = np.concatenate([p_values(EVEN, 20) for _ in range(100)])
    assert 0.01 < (null <= 0.1).mean() < 0.17  # of 200; layers and repeats are independent: 0.1 +- 0.042 in 95 %
