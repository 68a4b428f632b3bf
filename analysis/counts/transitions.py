"""Which expert follows which: from layer to layer for the same token, and from token to token at the same layer."""

import numpy as np
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked, add_pairs
from analysis.counts.usage import information_bits


class TransitionCounts(Chunked):
    """Pair counts of routed experts, every one of the K followed by every one of the K; memory is 2 L E^2 integers.

    `across_layers_LEE[l, i, j]`, of shape [L-1, E, E], counts tokens with expert i at layer l and j at layer l+1;
    `across_tokens_LEE[l, i, j]`, of shape [L, E, E], tokens with j at layer l whose predecessor in the sequence had i.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.num_layers, self.num_experts = num_layers, num_experts
        self._layers = np.zeros((max(num_layers - 1, 0), num_experts, num_experts), dtype=np.int64)
        self._tokens = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)

    @property
    def across_layers_LEE(self) -> NDArray[np.int64]:
        self.flush()
        return self._layers

    @property
    def across_tokens_LEE(self) -> NDArray[np.int64]:
        self.flush()
        return self._tokens

    def _count(self, chunk: Chunk) -> None:
        ids_LTK = chunk.ids_LTK
        add_pairs(ids_LTK[:-1], ids_LTK[1:], self._layers)
        follows_T = np.ones(ids_LTK.shape[1], dtype=bool)
        follows_T[chunk.offsets[:-1]] = False
        later = np.flatnonzero(follows_T)
        add_pairs(ids_LTK.take(later - 1, axis=1), ids_LTK.take(later, axis=1), self._tokens)


def conditional(counts_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return P(next selection is j | i was selected), rows summing to 1; NaN in the rows of experts never selected."""
    total = counts_LEE.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(counts_LEE, total, out=np.full(counts_LEE.shape, np.nan), where=total > 0))


def transition_bits(counts_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, per pair, how many bits the first selection tells about the second."""
    return information_bits(counts_LEE)
