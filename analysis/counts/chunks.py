"""Sequences gathered into chunks, so that short ones do not each pay for whole tables, and pairs counted as products.

Membership as zeros and ones makes pair counts matrix products: all pairs of experts at all pairs of layers are one
product of [T, L*E] with itself, at the full speed of the processor. Products are float32, exact below 2^24 tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from traces.schema import SequenceTrace

CHUNK_TOKENS = 8192
BLOCK_BYTES = 32 * 2**20  # of one float32 membership matrix


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some whole sequences in a row: `ids_TLK` of all tokens, `offsets` of where each begins and the last ends."""

    traces: list[SequenceTrace]

    @cached_property
    def ids_TLK(self) -> NDArray[np.integer]:
        return np.concatenate([trace.expert_ids_TLK for trace in self.traces])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Offsets of shape [S + 1]."""
        return np.cumsum([0, *(trace.num_tokens for trace in self.traces)])

    @cached_property
    def sequence_T(self) -> NDArray[np.int64]:
        """For every token, the place of its sequence in the chunk."""
        return np.repeat(np.arange(len(self.traces)), np.diff(self.offsets))

    @cached_property
    def ends_T(self) -> NDArray[np.int64]:
        """For every token, the place at which its sequence ends (exclusive)."""
        return np.repeat(self.offsets[1:], np.diff(self.offsets))


class Chunked(ABC):
    """A statistic that counts whole chunks; results must be read through `flush`, which counts what still waits."""

    min_sequences = 1  # of a chunk, but for the last

    def __init__(self) -> None:
        self._waiting: list[SequenceTrace] = []
        self._waiting_tokens = 0

    def add(self, trace: SequenceTrace) -> None:
        """Add one sequence."""
        self._waiting.append(trace)
        self._waiting_tokens += trace.num_tokens
        if self._waiting_tokens >= CHUNK_TOKENS and len(self._waiting) >= self.min_sequences:
            self.flush()

    def flush(self) -> None:
        """Count the sequences that wait for their chunk to fill."""
        if self._waiting_tokens:
            chunk = Chunk(self._waiting)
            self._waiting, self._waiting_tokens = [], 0
            self._count(chunk)

    @abstractmethod
    def _count(self, chunk: Chunk) -> None: ...


def membership(ids_TLK: NDArray[np.integer], num_experts: int, dtype: type = np.float32) -> NDArray[np.float32]:
    """Return [T, L*E]: 1 where the token's layer uses the expert, else 0."""
    tokens, layers, _ = ids_TLK.shape
    flat = np.zeros(tokens * layers * num_experts, dtype=dtype)
    base_TL1 = (np.arange(tokens * layers, dtype=np.int64) * num_experts).reshape(tokens, layers, 1)
    flat[(base_TL1 + ids_TLK).ravel()] = 1
    return flat.reshape(tokens, layers * num_experts)


def block_tokens(num_layers: int, num_experts: int) -> int:
    """Return how many tokens' membership fits into BLOCK_BYTES."""
    return max(1, min(CHUNK_TOKENS, BLOCK_BYTES // (4 * num_layers * num_experts)))


def pair_counts(
    before_TLK: NDArray[np.integer], after_TLK: NDArray[np.integer], num_experts: int, distances: int = 0
) -> NDArray[np.int64]:
    """Return counts [distances + 1, L, E, E]: at [d, l, i, j] the rows with i in `before` at layer l and j in `after`
    at layer l + d; zeros where there is no layer l + d."""
    num_layers = before_TLK.shape[1]
    counts = np.zeros((distances + 1, num_layers, num_experts, num_experts), dtype=np.int64)
    step = block_tokens(num_layers, num_experts)
    for start in range(0, len(before_TLK), step):
        before = membership(before_TLK[start : start + step], num_experts)
        after = before if after_TLK is before_TLK else membership(after_TLK[start : start + step], num_experts)
        for layer in range(num_layers):
            reach = min(distances, num_layers - 1 - layer) + 1
            columns = slice(layer * num_experts, (layer + reach) * num_experts)
            product = before[:, layer * num_experts : (layer + 1) * num_experts].T @ after[:, columns]
            found = product.reshape(num_experts, reach, num_experts).transpose(1, 0, 2)
            counts[:reach, layer] += found.astype(np.int64)
    return counts
