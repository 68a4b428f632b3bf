"""Temporal locality: how long an expert's use lasts, and how many experts a stretch of text needs.

A window's experts are counted by their first uses in it: how many windows of a length have a given use as their first
follows from the time since the use before it (Denning and Schwartz 1972, "Properties of the working-set model").
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked

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
        self.top_k = chunk.ids_LTK.shape[2]
        lengths_S = np.diff(chunk.offsets)
        self.tokens += int(lengths_S.sum())
        self.pairs_R += np.maximum(lengths_S - np.array(DISTANCES)[:, None], 0).sum(axis=1)
        self.windows_W += np.maximum(lengths_S - np.array(WINDOWS)[:, None] + 1, 0).sum(axis=1)
        _add_uses(
            *(chunk.ids_LTK, chunk.offsets, np.array(DISTANCES), np.array(WINDOWS)),
            *(self._counts_LE, self._shared_RL, self._distinct_WL),
        )


def _mean(sums_NL: NDArray[np.int64], number_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return sums over their number of terms, NaN where there were none."""
    number_N1 = number_N[:, None].astype(np.float64)
    return np.asarray(sums_NL / np.where(number_N1 > 0, number_N1, np.nan))


@njit(cache=True, nogil=True)
def _add_uses(
    ids_LTK: Any, offsets: Any, distance_R: Any, window_W: Any, counts_LE: Any, shared_RL: Any, distinct_WL: Any
) -> None:
    """Add every use of an expert to its count, to the earlier tokens that share it, to the windows it is first in."""
    layers, experts = counts_LE.shape
    shared_R, distinct_W = np.zeros_like(distance_R), np.zeros_like(window_W)
    for layer in range(layers):
        shared_R[:], distinct_W[:] = 0, 0
        for sequence in range(len(offsets) - 1):
            start, tokens = offsets[sequence], offsets[sequence + 1] - offsets[sequence]
            uses_TE = np.zeros((tokens, experts), np.uint8)
            last_E = np.full(experts, -1)
            for t in range(tokens):
                for expert in ids_LTK[layer, start + t]:
                    uses_TE[t, expert] = 1
                    counts_LE[layer, expert] += 1
                    for row in range(len(distance_R)):
                        if distance_R[row] > t:
                            break
                        shared_R[row] += uses_TE[t - distance_R[row], expert]
                    for row in range(len(window_W)):
                        earliest = max(last_E[expert] + 1, t - window_W[row] + 1)
                        distinct_W[row] += max(min(t, tokens - window_W[row]) - earliest + 1, 0)
                    last_E[expert] = t
        shared_RL[:, layer] += shared_R
        distinct_WL[:, layer] += distinct_W
