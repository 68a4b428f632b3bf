"""How unevenly a layer uses its experts, and how far single experts belong to one data set.

Entropy, effective number and Gini coefficient describe the shares of a layer's selections. Focus describes an expert:
the part of its selections that come from its favourite data set, all data sets weighed alike whatever their size, so
that an expert used by all alike has 1 / D. Chance alone gives more than that, since a favourite is chosen afterwards:
what shuffled data-set labels give is the measure.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.counts.significance import Moments, benjamini_hochberg
from analysis.counts.usage import UsageCounts, shares


@dataclass(frozen=True, eq=False)
class Focus:
    """Focus of every expert with its value under shuffled labels; NaN where an expert is never chosen.

    D counts the data sets that have enough sequences to be compared.
    """

    favourite_LE: NDArray[np.int64]  # place in `UsageCounts.datasets`
    focus_LE: NDArray[np.float64]  # 1 / D to 1
    chance_LE: NDArray[np.float64]  # mean over permutations
    p_LE: NDArray[np.float64]  # one-sided, from the moments of the permutations, see significance.py
    q_LE: NDArray[np.float64]  # Benjamini-Hochberg over all experts of all layers
    permutations: int


def entropy_bits(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Shannon entropy, in bits, of distributions along the last axis."""
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(axis=-1))


def effective_number(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2 to the entropy: how many equally used experts would have this entropy (Hill number of order 1)."""
    return np.asarray(2.0 ** entropy_bits(share))


def gini(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gini coefficient along the last axis: 0 where all are used alike, (E - 1) / E where one has all."""
    rising = np.sort(share, axis=-1)
    number = share.shape[-1]
    ranks = 2 * np.arange(1, number + 1) - number - 1
    total = rising.sum(axis=-1)
    return np.asarray(
        np.divide((ranks * rising).sum(axis=-1), number * total, out=np.zeros_like(total), where=total > 0)
    )


def focus(usage: UsageCounts) -> Focus | None:
    """Return every expert's focus against shuffled labels; None without two data sets to compare."""
    if not usage.shuffled.permutations:
        return None
    parts_DLE = _parts(usage.counts_DLE[usage.compared])
    focus_LE = parts_DLE.max(axis=0)
    # an expert that a permutation leaves without any use would make its mean NaN: it counts as used by all alike
    shuffled = (
        np.nan_to_num(_parts(counts_PDLE).max(axis=1), nan=1 / len(usage.compared))
        for counts_PDLE in usage.shuffled.blocks()
    )
    moments = Moments.of(shuffled)
    p_LE = np.where(np.isnan(focus_LE), np.nan, moments.upper(focus_LE))
    return Focus(
        favourite_LE=np.array(usage.compared)[np.nan_to_num(parts_DLE, nan=-1.0).argmax(axis=0)],
        focus_LE=focus_LE,
        chance_LE=np.where(np.isnan(focus_LE), np.nan, moments.mean),
        p_LE=p_LE,
        q_LE=benjamini_hochberg(p_LE),
        permutations=usage.shuffled.permutations,
    )


def _parts(counts_DLE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return which part of an expert's use falls on each data set [..., D, L, E], data sets weighed alike."""
    share_DLE = shares(counts_DLE)
    total = share_DLE.sum(axis=-3, keepdims=True)
    return np.asarray(np.divide(share_DLE, total, out=np.full(share_DLE.shape, np.nan), where=total > 0))
