"""Which experts of a layer are used together: by one token, and within the next tokens.

Within a token the K experts differ, so that even indifferent routers never pair an expert with itself; the yardstick is
quasi-independence (Goodman 1968, "The analysis of cross-classified data"): the pair table with the same totals and an
empty diagonal that is otherwise a product. Over a window of tokens it is plain independence of the table's totals.
"""

import numpy as np
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked, block_tokens, membership
from analysis.counts.usage import information_bits

WINDOW = 16  # following tokens, a power of two
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
        experts = self.num_experts
        step = block_tokens(self.num_layers, experts)
        self.tokens += len(chunk.ids_TLK)
        # laid out with WINDOW empty rows after each sequence, so that no window reaches into the next one
        place_T = np.arange(len(chunk.ids_TLK)) + WINDOW * chunk.sequence_T
        for first in range(0, int(place_T[-1]) + 1, step):
            low, high = np.searchsorted(place_T, (first, first + step + WINDOW))
            rows = np.zeros((step + WINDOW, self.num_layers * experts), dtype=np.uint8)
            rows[place_T[low:high] - first] = membership(chunk.ids_TLK[low:high], experts, np.uint8)
            sums, width = rows, 1
            while width < WINDOW:  # sums[t] is that of rows t to t + width - 1
                sums = sums[:-width] + sums[width:]
                width *= 2
            now, following = rows[:step].astype(np.float32), sums[1:].astype(np.float32)
            for layer in range(self.num_layers):
                own = slice(layer * experts, (layer + 1) * experts)
                used = now[:, own].T
                self._within[layer] += (used @ now[:, own]).astype(np.int64)
                self._window[layer] += (used @ following[:, own]).astype(np.int64)


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
