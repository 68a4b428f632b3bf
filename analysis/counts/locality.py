"""Temporal locality: how long an expert's use lasts, and how many experts a stretch of text needs.

Sets of experts are kept as bits, E of them in whole 64-bit words, so that comparing two tokens is one AND and a count
of ones, and the union over a window of 2w tokens is the OR of two windows of w.
"""

import numpy as np
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked
from analysis.counts.usage import count_experts

DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens


class LocalityCounts(Chunked):
    """Sums over pairs of tokens of one sequence at each of DISTANCES, and over windows of each of WINDOWS."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.num_layers, self.num_experts = num_layers, num_experts
        self._shared_RL = np.zeros((len(DISTANCES), num_layers), dtype=np.int64)  # experts that both tokens use
        self.pairs_R = np.zeros(len(DISTANCES), dtype=np.int64)
        self._distinct_WL = np.zeros((len(WINDOWS), num_layers), dtype=np.int64)  # experts that a window uses
        self.windows_W = np.zeros(len(WINDOWS), dtype=np.int64)
        self._counts_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.tokens = 0
        self.top_k = 0

    def reuse_RL(self) -> NDArray[np.float64]:
        """Return, by distance and layer, which part of a token's K experts the token that far before it used too."""
        self.flush()
        return _mean(self._shared_RL, self.pairs_R * max(self.top_k, 1))

    def independent_reuse_L(self) -> NDArray[np.float64]:
        """Return what reuse would be at any distance if tokens chose independently, each expert as often as here."""
        return np.asarray((self._used_LE() ** 2).sum(axis=-1) / max(self.top_k, 1))

    def working_set_WL(self) -> NDArray[np.float64]:
        """Return, by window and layer, how many different experts the tokens of a window use on average."""
        self.flush()
        return _mean(self._distinct_WL, self.windows_W)

    def independent_working_set_WL(self) -> NDArray[np.float64]:
        """Return what the working set would be if tokens chose independently, each expert as often as here."""
        used_LE = self._used_LE()
        return np.stack([(1 - (1 - used_LE) ** window).sum(axis=-1) for window in WINDOWS])

    def _used_LE(self) -> NDArray[np.float64]:
        """Return the part of the tokens that use each expert."""
        self.flush()
        return np.asarray(self._counts_LE / max(self.tokens, 1))

    def _count(self, chunk: Chunk) -> None:
        ids_TLK = chunk.ids_TLK
        tokens = len(ids_TLK)
        self.top_k = ids_TLK.shape[2]
        self.tokens += tokens
        self._counts_LE += count_experts(ids_TLK, self.num_experts)
        sets_TLB = as_bits(ids_TLK, self.num_experts)
        place_T = np.arange(tokens)
        for row, distance in enumerate(DISTANCES):
            first = np.flatnonzero(place_T + distance < chunk.ends_T)
            if len(first):
                shared = np.bitwise_count(sets_TLB[first] & sets_TLB[first + distance])
                self._shared_RL[row] += shared.sum(axis=(0, 2), dtype=np.int64)
                self.pairs_R[row] += len(first)
        united = sets_TLB
        for row, window in enumerate(WINDOWS):
            if row:
                half = WINDOWS[row - 1]
                if len(united) <= half:
                    break
                united = united[:-half] | united[half:]
            first = np.flatnonzero((place_T + window <= chunk.ends_T)[: len(united)])
            self._distinct_WL[row] += np.bitwise_count(united[first]).sum(axis=(0, 2), dtype=np.int64)
            self.windows_W[row] += len(first)


def as_bits(ids_TLK: NDArray[np.integer], num_experts: int) -> NDArray[np.uint64]:
    """Return the sets of experts as words [T, L, ceil(E / 64)]."""
    tokens, layers, top_k = ids_TLK.shape
    words = -(-num_experts // 64)
    bits = np.zeros((tokens, layers, words), dtype=np.uint64)
    one = np.uint64(1)
    for k in range(top_k):
        ids_TL = ids_TLK[:, :, k].astype(np.uint64)
        for word in range(words):
            inside = (ids_TL >> np.uint64(6)) == word
            bits[:, :, word] |= np.where(inside, one << (ids_TL & np.uint64(63)), np.uint64(0))
    return bits


def _mean(sums_NL: NDArray[np.int64], number_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return sums over their number of terms, NaN where there were none."""
    number_N1 = number_N[:, None].astype(np.float64)
    return np.asarray(sums_NL / np.where(number_N1 > 0, number_N1, np.nan))
