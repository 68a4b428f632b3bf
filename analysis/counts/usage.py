"""How often each layer uses each expert, by data set, and whether that says more about the data set than chance would.

Everything is counted in one pass, the permutation test included (see significance.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.significance import Moments, ShuffledCounts, benjamini_hochberg
from traces.schema import SequenceTrace

PERMUTATIONS = 1000
LEAST_SEQUENCES = 8  # of a data set that is compared with others: the mean of fewer says more about them than about it


@dataclass(frozen=True, eq=False)
class MutualInformation:
    """Mutual information between data set and routed expert, in bits per layer, and its value under shuffled labels."""

    bits_L: NDArray[np.float64]
    shuffled_mean_L: NDArray[np.float64]
    shuffled_low_L: NDArray[np.float64]  # 2.5 % quantile over permutations
    shuffled_high_L: NDArray[np.float64]  # 97.5 % quantile
    p_value_L: NDArray[np.float64]  # (1 + permutations at least as large) / (1 + permutations)
    permutations: int


@dataclass(frozen=True, eq=False)
class Differences:
    """Each data set's share less the mean share over those compared, with two-sided p and q over the cells of these.

    p and q are NaN for data sets of too few sequences to be compared.
    """

    difference_DLE: NDArray[np.float64]
    p_DLE: NDArray[np.float64]  # from the moments of the permutations, see significance.py
    q_DLE: NDArray[np.float64]  # Benjamini-Hochberg
    permutations: int


class UsageCounts:
    """Counts of routed experts by data set (D), layer (L) and expert (E), with P shuffled copies.

    `sequence_datasets` holds the data set of every sequence that will be added, in any order: labels are permuted over
    sequences, never over tokens, because tokens of one sequence are not independent. Only data sets that have
    LEAST_SEQUENCES are compared: they alone are shuffled, and are what a mean over data sets is taken over.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        sequence_datasets: Sequence[str],
        *,
        permutations: int = PERMUTATIONS,
        seed: int = 0,
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.datasets = sorted(set(sequence_datasets))
        self._row_of = {name: row for row, name in enumerate(self.datasets)}
        shape = (len(self.datasets), num_layers, num_experts)
        self.counts_DLE = np.zeros(shape, dtype=np.int64)
        self.first_counts_LE = np.zeros(shape[1:], dtype=np.int64)
        self.tokens_D = np.zeros(len(self.datasets), dtype=np.int64)
        self.sequences_D = np.zeros(len(self.datasets), dtype=np.int64)
        announced = Counter(sequence_datasets)
        self._announced_D = np.array([announced[name] for name in self.datasets], dtype=np.int64)
        self.compared = [row for row, number in enumerate(self._announced_D.tolist()) if number >= LEAST_SEQUENCES]
        place_of = {self.datasets[row]: place for place, row in enumerate(self.compared)}
        labels = [place_of[name] for name in sequence_datasets if name in place_of]
        self.shuffled = ShuffledCounts(labels, len(self.compared), shape[1:], permutations, seed)

    def add(self, trace: SequenceTrace) -> None:
        """Add one sequence; raises ValueError for a data set or a sequence that was not announced."""
        if trace.dataset not in self._row_of:
            raise ValueError(f"data set {trace.dataset!r} was not announced; known: {', '.join(self.datasets)}")
        row = self._row_of[trace.dataset]
        if self.sequences_D[row] == self._announced_D[row]:
            raise ValueError(f"more sequences of {trace.dataset!r} than the {self._announced_D[row]} announced")
        counts_LE = count_experts(trace.expert_ids_TLK, self.num_experts)
        if row in self.compared:
            self.shuffled.add(counts_LE, trace.num_tokens)
        self.counts_DLE[row] += counts_LE
        self.first_counts_LE += count_experts(trace.expert_ids_TLK[:, :, :1], self.num_experts)
        self.tokens_D[row] += len(trace.expert_ids_TLK)
        self.sequences_D[row] += 1

    def share_LE(self) -> NDArray[np.float64]:
        """Return each expert's share of its layer's selections; rows sum to 1 (or are 0 where nothing was traced)."""
        return shares(self.counts_DLE.sum(axis=0))

    def first_share_LE(self) -> NDArray[np.float64]:
        """Return each expert's share of its layer's first choices; meaningful where `expert_order` is `weight`."""
        return shares(self.first_counts_LE)

    def difference_DLE(self) -> NDArray[np.float64]:
        """Return each data set's share less the mean share over those compared, each of which weighs alike."""
        share_DLE = shares(self.counts_DLE)
        return np.asarray(share_DLE - share_DLE[self.compared].mean(axis=0))

    def differences(self) -> Differences | None:
        """Compare every difference with its values under shuffled labels; None without two data sets to compare."""
        if not self.shuffled.permutations:
            return None
        observed_DLE = self.difference_DLE()
        moments = Moments.of(_less_the_mean(counts_PDLE) for counts_PDLE in self.shuffled.blocks())
        p_DLE = np.full(observed_DLE.shape, np.nan)
        p_DLE[self.compared] = moments.two_sided(observed_DLE[self.compared])
        return Differences(observed_DLE, p_DLE, benjamini_hochberg(p_DLE), self.shuffled.permutations)

    def mutual_information(self) -> MutualInformation | None:
        """Compare data-set information with shuffled labels; None without two data sets to compare."""
        if not self.shuffled.permutations:
            return None
        bits_L = information_bits(np.moveaxis(self.counts_DLE[self.compared], 1, 0))
        shuffled_PL = np.concatenate(
            [information_bits(np.moveaxis(block, 2, 1)) for block in self.shuffled.blocks()], axis=0
        )
        low_L, high_L = np.quantile(shuffled_PL, (0.025, 0.975), axis=0)
        at_least_L = (shuffled_PL >= bits_L - 1e-12).sum(axis=0)
        return MutualInformation(
            bits_L=bits_L,
            shuffled_mean_L=shuffled_PL.mean(axis=0),
            shuffled_low_L=low_L,
            shuffled_high_L=high_L,
            p_value_L=(1 + at_least_L) / (1 + len(shuffled_PL)),
            permutations=len(shuffled_PL),
        )


def count_experts(expert_ids_TLK: NDArray[np.integer], num_experts: int) -> NDArray[np.int64]:
    """Return counts_LE of the experts in `expert_ids_TLK`."""
    num_layers = expert_ids_TLK.shape[1]
    offset_L1 = np.arange(num_layers, dtype=np.int64)[:, None] * num_experts
    flat = (expert_ids_TLK.astype(np.int64) + offset_L1).ravel()
    return np.bincount(flat, minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def information_bits(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mutual information, in bits, between the last two axes of joint counts [..., rows, columns]."""
    total = counts.sum(axis=(-2, -1), keepdims=True)
    joint = counts / np.maximum(total, 1)
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return np.asarray((joint * np.log2(ratio)).sum(axis=(-2, -1)))


def shares(counts: NDArray[np.floating[Any]] | NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return counts over their sum along the last axis; 0 where that sum is 0."""
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))


def _less_the_mean(counts_DLE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return shares [..., D, L, E] less their mean over data sets."""
    share_DLE = shares(counts_DLE)
    return np.asarray(share_DLE - share_DLE.mean(axis=-3, keepdims=True))
