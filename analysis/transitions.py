"""Which expert follows which: from layer to layer for the same token, and from token to token at the same layer."""

import numpy as np
from numpy.typing import NDArray

from analysis.usage import information_bits
from traces.schema import SequenceTrace

CHUNK_TOKENS = 8192  # sequences are counted together, so that short ones do not each pay for a whole count table


class TransitionCounts:
    """Pair counts of routed experts, every one of the K followed by every one of the K; memory is 2 L E^2 integers.

    `across_layers_LEE[l, i, j]`, of shape [L-1, E, E], counts tokens with expert i at layer l and j at layer l+1;
    `across_tokens_LEE[l, i, j]`, of shape [L, E, E], tokens with j at layer l whose predecessor in the sequence had i.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._layers = np.zeros((max(num_layers - 1, 0), num_experts, num_experts), dtype=np.int64)
        self._tokens = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
        self._waiting: list[NDArray[np.integer]] = []
        self._waiting_tokens = 0

    def add(self, trace: SequenceTrace) -> None:
        """Add one sequence."""
        self._waiting.append(trace.expert_ids_TLK)
        self._waiting_tokens += len(trace.expert_ids_TLK)
        if self._waiting_tokens >= CHUNK_TOKENS:
            self._count()

    @property
    def across_layers_LEE(self) -> NDArray[np.int64]:
        self._count()
        return self._layers

    @property
    def across_tokens_LEE(self) -> NDArray[np.int64]:
        self._count()
        return self._tokens

    def _count(self) -> None:
        if not self._waiting:
            return
        ids_TLK = np.concatenate(self._waiting).astype(np.int64)
        starts = np.cumsum([len(ids) for ids in self._waiting])[:-1]
        self._waiting, self._waiting_tokens = [], 0
        if self.num_layers > 1:
            self._layers += _pair_counts(ids_TLK[:, :-1], ids_TLK[:, 1:], self.num_experts)
        follows_T = np.ones(len(ids_TLK), dtype=bool)
        follows_T[0] = False
        follows_T[starts] = False
        later = np.flatnonzero(follows_T)
        if len(later):
            self._tokens += _pair_counts(ids_TLK[later - 1], ids_TLK[later], self.num_experts)


def conditional(counts_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return P(next selection is j | i was selected), rows summing to 1; NaN in the rows of experts never selected."""
    total = counts_LEE.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(counts_LEE, total, out=np.full(counts_LEE.shape, np.nan), where=total > 0))


def transition_bits(counts_LEE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, per pair, how many bits the first selection tells about the second."""
    return information_bits(counts_LEE)


def _pair_counts(before_TLK: NDArray[np.int64], after_TLK: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Count all K x K pairs; the loop over K bounds the temporary to T*L*K numbers."""
    num_layers = before_TLK.shape[1]
    size = num_layers * num_experts * num_experts
    base_L1 = np.arange(num_layers, dtype=np.int64)[:, None] * num_experts**2
    counts = np.zeros(size, dtype=np.int64)
    for k in range(before_TLK.shape[2]):
        flat_TLK = base_L1 + before_TLK[:, :, k : k + 1] * num_experts + after_TLK
        counts += np.bincount(flat_TLK.ravel(), minlength=size)
    return counts.reshape(num_layers, num_experts, num_experts)
