"""Permutation over sequences in one pass, p-values from it, and false-discovery control.

The unit is the sequence, never the token: tokens of one text are not independent. The shuffled labels of all sequences
are drawn beforehand, and each sequence is added to its shuffled group in every permutation as it passes by.

Counting how many of P permutations are as extreme gives no p below 1 / (1 + P), which no single cell of thousands
survives once it is corrected for their number. The p of a cell is therefore the tail of a distribution that has the
moments of the cell's own permutations (as in Larson and Owen 2015, "Moment based gene set tests"): Student's t with
their kurtosis for differences, whose sign does not matter, and Pearson's type III with their skewness for what is
one-sided.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

NULL_BYTES = 96 * 2**20  # that shuffled counts, and as many again that shuffled labels, may take
MIN_PERMUTATIONS = 20
BATCH_SEQUENCES = 256
EXACT_TOKENS = 2**23  # of a batch: float32 sums stay exact
BLOCK_NUMBERS = 2**21  # of one block of shuffled counts handed out
LEAST_KURTOSIS = 0.05  # in excess of the normal's; below, Student's t is as good as normal
LEAST_SKEWNESS = 0.02  # below, and where it is negative, Pearson's type III is as good as normal


class ShuffledCounts:
    """Counts by label under P permutations of the labels over sequences: [P, D, *shape] of what `add` gets, [*shape].

    `labels` are those of all sequences that will be added, 0..D-1 each; any order of adding is as good as another.
    Fewer permutations than asked for are made where they would take more than NULL_BYTES.
    """

    def __init__(
        self, labels: Sequence[int], num_labels: int, shape: tuple[int, ...], permutations: int, seed: int
    ) -> None:
        size = num_labels * int(np.prod(shape))
        most = min(NULL_BYTES // max(4 * size, 1), NULL_BYTES // max(2 * len(labels), 1))
        self.permutations = min(permutations, max(MIN_PERMUTATIONS, most)) if num_labels > 1 else 0
        self._num_labels, self._shape = num_labels, shape
        rng = np.random.default_rng(seed)
        drawn = np.asarray(labels, dtype=np.uint16)
        self._labels_PS = np.empty((self.permutations, len(drawn)), dtype=np.uint16)
        for row in self._labels_PS:
            row[:] = rng.permutation(drawn)
        self._sums = np.zeros((self.permutations * num_labels, int(np.prod(shape))), dtype=np.int64)
        self._waiting: list[NDArray[np.int64]] = []
        self._waiting_tokens = 0
        self._added = 0

    def add(self, counts: NDArray[np.int64], tokens: int) -> None:
        """Add one sequence's counts; raises ValueError when more sequences come than labels were announced."""
        if not self.permutations:
            return
        if self._added + len(self._waiting) >= self._labels_PS.shape[1]:
            raise ValueError(f"more sequences were added than the {self._labels_PS.shape[1]} announced")
        self._waiting.append(counts.ravel())
        self._waiting_tokens += tokens
        if len(self._waiting) >= BATCH_SEQUENCES or self._waiting_tokens >= EXACT_TOKENS:
            self._flush()

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield the counts of some permutations at a time, [p, D, *shape]."""
        self._flush()
        step = max(1, BLOCK_NUMBERS // (self._num_labels * int(np.prod(self._shape)))) * self._num_labels
        for start in range(0, len(self._sums), step):
            yield self._sums[start : start + step].reshape(-1, self._num_labels, *self._shape)

    def _flush(self) -> None:
        if not self._waiting:
            return
        counts_SN = np.stack(self._waiting).astype(np.float32)
        labels_PS = self._labels_PS[:, self._added : self._added + len(counts_SN)]
        self._added += len(counts_SN)
        self._waiting, self._waiting_tokens = [], 0
        is_label_PDS = labels_PS[:, None, :] == np.arange(self._num_labels)[:, None]
        weights = is_label_PDS.reshape(-1, len(counts_SN)).astype(np.float32)
        for start in range(0, len(weights), 1024):
            self._sums[start : start + 1024] += (weights[start : start + 1024] @ counts_SN).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of each cell over permutations, arrays of the cells' shape; NaN where a cell is."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    skewness: NDArray[np.float64]
    kurtosis: NDArray[np.float64]  # in excess of the normal's
    permutations: int

    @classmethod
    def of(cls, blocks: Iterable[NDArray[np.float64]]) -> "Moments":
        """Return the moments over the first axis of all blocks together, [p, *cells] each."""
        shift, number, sums = np.zeros(0), 0, np.zeros(0)
        for block in blocks:
            if not number:
                shift = block.mean(axis=0)  # powers of what is left over it lose no digits
                sums = np.zeros((4, *shift.shape))
            number += len(block)
            away = block - shift
            power = away.copy()
            for total in sums:
                total += power.sum(axis=0)
                power *= away
        first, second, third, fourth = sums / max(number, 1)
        variance = np.maximum(second - first**2, 0.0)
        moved = variance > 1e-18
        scale = np.where(moved, variance, 1.0)
        central_3 = third - 3 * first * second + 2 * first**3
        central_4 = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return cls(
            mean=shift + first,
            deviation=np.sqrt(np.where(moved, variance, 0.0) * number / max(number - 1, 1)),
            skewness=np.where(moved, central_3 / scale**1.5, 0.0),
            kurtosis=np.where(moved, central_4 / scale**2 - 3, 0.0),
            permutations=number,
        )

    def two_sided(self, observed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return p of a value this far from the mean, on either side: Student's t of the same kurtosis."""
        # t of n degrees of freedom has the variance n / (n - 2) and an excess kurtosis of 6 / (n - 4)
        freedom = 4 + 6 / np.maximum(self.kurtosis, LEAST_KURTOSIS)
        away = np.abs(self._standardised(observed)) * np.sqrt(freedom / (freedom - 2))
        return np.asarray(2 * stats.t.sf(away, np.minimum(freedom, max(self.permutations - 1, 1))))

    def upper(self, observed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return p of a value at least as large: Pearson's type III of the same skewness."""
        shape = 4 / np.maximum(self.skewness, LEAST_SKEWNESS) ** 2
        away = self._standardised(observed)
        return np.asarray(special.gammaincc(shape, np.maximum(shape + np.sqrt(shape) * away, 0.0)))

    def _standardised(self, observed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return deviations from the mean; a cell that no permutation moves and that is as they are has 0."""
        away = observed - self.mean
        still = self.deviation == 0
        distance = np.divide(away, self.deviation, out=np.zeros_like(away), where=~still)
        return np.where(still & (np.abs(away) > 1e-9), np.copysign(np.inf, away), distance)


def benjamini_hochberg(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return q-values over all of an array's finite p-values (Benjamini and Hochberg 1995); NaN stays NaN."""
    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q
