"""Sequences gathered into chunks, so that short ones do not each pay for whole tables, and pairs counted in them.

A token uses few of the experts: its K x K pairs are counted one by one, compiled, which is far less work than a matrix
product over all E x E. Loops run layer by layer, so that one layer's table stays in the processor's cache. Nothing
compiled looks whether ids are below E: reading a shard does.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from traces.schema import SequenceTrace

CHUNK_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some whole sequences in a row: `ids_LTK` of all tokens, `offsets` of where each begins and the last ends."""

    traces: list[SequenceTrace]

    @cached_property
    def ids_LTK(self) -> NDArray[np.integer]:
        """Experts with the layers first, as the compiled loops go through them."""
        ids_TLK = np.concatenate([trace.expert_ids_TLK for trace in self.traces])
        return np.ascontiguousarray(ids_TLK.transpose(1, 0, 2))

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Offsets of shape [S + 1]."""
        return np.cumsum([0, *(trace.num_tokens for trace in self.traces)])

    @cached_property
    def sequence_T(self) -> NDArray[np.int64]:
        """For every token, the place of its sequence in the chunk."""
        return np.repeat(np.arange(len(self.traces)), np.diff(self.offsets))


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


@njit(cache=True, nogil=True)
def add_pairs(before_LTK: Any, after_LTK: Any, counts_LEE: Any) -> None:
    """Add to `counts_LEE[l, i, j]` the tokens with i in `before` and j in `after`, at layer l of both."""
    layers, tokens, top_k = before_LTK.shape
    for layer in range(layers):
        for t in range(tokens):
            for k in range(top_k):
                for m in range(top_k):
                    counts_LEE[layer, before_LTK[layer, t, k], after_LTK[layer, t, m]] += 1
