"""Permutation over sequences in one pass, p-values from it, and false-discovery control.

The unit is the sequence, never the token: tokens of one text are not independent. The shuffled labels of all sequences
are drawn beforehand, and each sequence is added to its shuffled group in every permutation as it passes by.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

NULL_BYTES = 96 * 2**20  # that shuffled counts, and as many again that shuffled labels, may take
MIN_PERMUTATIONS = 20
BATCH_SEQUENCES = 256
EXACT_TOKENS = 2**23  # of a batch: float32 sums stay exact
BLOCK_NUMBERS = 2**21  # of one block of shuffled counts handed out


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


def benjamini_hochberg(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return q-values over all of an array's finite p-values (Benjamini and Hochberg 1995); NaN stays NaN."""
    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known], method="bh")
    return q
