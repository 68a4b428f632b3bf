"""Which experts of a layer are used together: by one token, and within the next tokens.

Within a token the K experts differ, so that even indifferent routers never pair an expert with itself; the yardstick is
quasi-independence (Goodman 1968, "The analysis of cross-classified data"): the pair table with the same totals and an
empty diagonal that is otherwise a product. Over a window of tokens it is plain independence of the table's totals.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked, add_pairs
from analysis.counts.usage import information_bits

WINDOW = 16  # following tokens
FITTING_STEPS = 500


class CoactivationCounts(Chunked):
    """Pair counts per layer, [L, E, E].

    `within_LEE[l, i, j]` counts tokens that use both i and j (on the diagonal: that use i);
    `window_LEE[l, i, j]` pairs of a token that uses i and one of the WINDOW tokens after it, in its sequence, that
    uses j.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.num_layers, self.num_experts = num_layers, num_experts
        self._within = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
        self._window = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
        self.tokens = 0

    @property
    def within_LEE(self) -> NDArray[np.int64]:
        self.flush()
        return self._within

    @property
    def window_LEE(self) -> NDArray[np.int64]:
        self.flush()
        return self._window

    def _count(self, chunk: Chunk) -> None:
        self.tokens += int(chunk.offsets[-1])
        add_pairs(chunk.ids_LTK, chunk.ids_LTK, self._within)
        _add_following(chunk.ids_LTK, chunk.offsets, WINDOW, self._window)


def expected_within(within_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the quasi-independent pair tables with the totals of `within_LEE` off its diagonal, [L, E, E].

    Fitted as a_i * a_j off the diagonal by symmetric iterative scaling; experts without pairs stay 0.
    """
    observed = _off_diagonal(within_LEE)
    target_LE = observed.sum(axis=-1)
    a_LE = np.sqrt(target_LE)
    for _ in range(FITTING_STEPS):
        fitted_LE = a_LE * (a_LE.sum(axis=-1, keepdims=True) - a_LE)
        ratio_LE = np.divide(target_LE, fitted_LE, out=np.ones_like(target_LE), where=fitted_LE > 0)
        a_LE = a_LE * np.sqrt(ratio_LE)
        if np.abs(ratio_LE - 1).max(initial=0.0) < 1e-9:
            break
    return _off_diagonal(a_LE[:, :, None] * a_LE[:, None, :])


def expected_window(window_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the independent tables with the row and column totals of `window_LEE`."""
    total = window_LEE.sum(axis=(-2, -1), keepdims=True)
    product = window_LEE.sum(axis=-1, keepdims=True) * (window_LEE.sum(axis=-2, keepdims=True) / np.maximum(total, 1))
    return np.asarray(product, dtype=np.float64)


def lift(observed: NDArray[np.number], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return observed over expected counts; NaN where nothing is expected."""
    return np.asarray(np.divide(observed, expected, out=np.full(expected.shape, np.nan), where=expected > 0))


def within_bits(within_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, per layer, the divergence in bits of the pairs within a token from quasi-independence."""
    observed = _off_diagonal(within_LEE)
    expected = expected_within(within_LEE)
    share, ratio = observed / np.maximum(observed.sum(axis=(-2, -1), keepdims=True), 1), lift(observed, expected)
    logs = np.log2(ratio, out=np.zeros_like(ratio), where=(observed > 0) & (expected > 0))
    return np.asarray((share * logs).sum(axis=(-2, -1)))


def window_bits(window_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, per layer, how many bits a selection tells about one of a token of the window after it."""
    return information_bits(window_LEE)


def _off_diagonal(table_LEE: NDArray[np.number]) -> NDArray[np.float64]:
    emptied = table_LEE.astype(np.float64)
    places = np.arange(emptied.shape[-1])
    emptied[:, places, places] = 0.0
    return emptied


@njit(cache=True, nogil=True)
def _add_following(ids_LTK: Any, offsets: Any, window: int, counts_LEE: Any) -> None:
    """Go back from the end of every sequence, with the uses of each expert in the `window` tokens after the current."""
    layers, experts, _ = counts_LEE.shape
    for layer in range(layers):
        ids_TK = ids_LTK[layer]
        table_EE = np.zeros((experts, experts), np.uint32)  # half of int64: it stays in the cache
        for sequence in range(len(offsets) - 1):
            first, end = offsets[sequence], offsets[sequence + 1]
            following_E = np.zeros(experts, np.uint32)
            for t in range(end - 1, first - 1, -1):
                for expert in ids_TK[t]:
                    row_E = table_EE[expert]
                    for other in range(experts):  # `+=` of arrays is slower
                        row_E[other] += following_E[other]
                for expert in ids_TK[t]:
                    following_E[expert] += 1
                if t + window < end:
                    for expert in ids_TK[t + window]:
                        following_E[expert] -= 1
        for expert in range(experts):
            for other in range(experts):
                counts_LEE[layer, expert, other] += table_EE[expert, other]
