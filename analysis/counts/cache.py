"""What a cache of the c most recently used experts per layer would hit: exact, and for every c at once.

LRU caches are nested, so one pass with the stack of experts by last use gives the hits of every size (Mattson, Gecsei,
Slutz and Traiger 1970, "Evaluation techniques for storage hierarchies"). Tokens come one after another, as in decoding;
all K experts of a token are looked up before they are moved to the top, the first choice topmost. Every sequence starts
with an empty cache.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked

BATCH_NUMBERS = 2**18  # stack places that are held at once


class StackDistances(Chunked):
    """Histogram of stack distances per layer, [L, E + 1]: at d >= 1 how often the expert was d-th from the top.

    At 0 stand the first uses of an expert in its sequence, which no cache that starts empty can hit.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.num_layers, self.num_experts = num_layers, num_experts
        self._histogram = np.zeros((num_layers, num_experts + 1), dtype=np.int64)
        self.top_k = 1

    @property
    def histogram_LD(self) -> NDArray[np.int64]:
        self.flush()
        return self._histogram

    def hit_rate_LC(self) -> NDArray[np.float64]:
        """Return the part of lookups that a cache of c experts hits, [L, E + 1] for c = 0..E; its misses are fetches.

        Sizes below K cannot hold the experts of one token.
        """
        histogram_LD = self.histogram_LD
        hits_LC = histogram_LD.cumsum(axis=1) - histogram_LD[:, :1]
        return np.asarray(hits_LC / np.maximum(histogram_LD.sum(axis=1, keepdims=True), 1))

    def _count(self, chunk: Chunk) -> None:
        self.top_k = chunk.ids_TLK.shape[2]
        order = sorted(chunk.traces, key=lambda trace: -trace.num_tokens)  # those that end early stand last
        size = max(1, BATCH_NUMBERS // (self.num_layers * self.num_experts))
        for start in range(0, len(order), size):
            self._count_batch([trace.expert_ids_TLK for trace in order[start : start + size]])

    def _count_batch(self, sequences: list[NDArray[np.integer]]) -> None:
        """Step through the tokens of several sequences side by side; they are sorted by falling length."""
        experts, layers = self.num_experts, self.num_layers
        dtype = np.uint8 if experts <= 256 else np.uint16
        stack_SLE: NDArray[Any] = np.broadcast_to(
            np.arange(experts, dtype=dtype), (len(sequences), layers, experts)
        ).copy()
        seen_SL1 = np.zeros((len(sequences), layers, 1), dtype=np.int64)  # unseen experts stay below all seen ones
        top_K = np.arange(self.top_k, dtype=dtype)
        lengths = np.array([len(ids) for ids in sequences])
        bins = np.zeros(layers * (experts + 1), dtype=np.int64)
        base_L1 = np.arange(layers)[:, None] * (experts + 1)
        found: list[NDArray[np.int64]] = []
        for token in range(int(lengths[0])):
            running = int(np.searchsorted(-lengths, -token, side="left"))  # sequences longer than `token`
            ids_SLK = np.stack([ids[token] for ids in sequences[:running]]).astype(np.int64)
            stack = stack_SLE[:running]
            place_SLK: NDArray[Any] = np.take_along_axis(stack, ids_SLK, axis=2)
            cold_SLK = place_SLK >= seen_SL1[:running]
            found.append((np.where(cold_SLK, 0, place_SLK.astype(np.int64) + 1) + base_L1).ravel())
            seen_SL1[:running] += cold_SLK.sum(axis=2, keepdims=True)
            passed: NDArray[Any] = np.zeros(stack.shape, dtype=dtype)
            for k in range(self.top_k):
                passed += stack < place_SLK[:, :, k : k + 1]
            stack += passed
            np.put_along_axis(stack, ids_SLK, np.broadcast_to(top_K, ids_SLK.shape), axis=2)
        bins += np.bincount(np.concatenate(found), minlength=len(bins))
        self._histogram += bins.reshape(layers, experts + 1)


def static_hit_rate_LC(share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the hits of a cache that always holds the c experts most used in these traces, [L, E + 1]."""
    falling_LE = -np.sort(-share_LE, axis=1)
    return np.concatenate([np.zeros((len(share_LE), 1)), falling_LE.cumsum(axis=1)], axis=1)
