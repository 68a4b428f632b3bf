"""What a cache of the c most recently used experts per layer would hit: exact, and for every c at once.

LRU caches are nested, so one pass with the stack of experts by last use gives the hits of every size (Mattson, Gecsei,
Slutz and Traiger 1970, "Evaluation techniques for storage hierarchies"). Tokens come one after another, as in decoding;
all K experts of a token are looked up before they are moved to the top, the first choice topmost. Every sequence starts
with an empty cache.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked


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
        self.top_k = chunk.ids_LTK.shape[2]
        _add_distances(chunk.ids_LTK, chunk.offsets, self._histogram)


def static_hit_rate_LC(share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the hits of a cache that always holds the c experts most used in these traces, [L, E + 1]."""
    falling_LE = -np.sort(-share_LE, axis=1)
    return np.concatenate([np.zeros((len(share_LE), 1)), falling_LE.cumsum(axis=1)], axis=1)


@njit(cache=True, nogil=True)
def _add_distances(ids_LTK: Any, offsets: Any, histogram_LD: Any) -> None:
    """Keep every expert's place in the stack, E where it is not in it: it moves by the deeper ones that are used."""
    layers, _, top_k = ids_LTK.shape
    experts = histogram_LD.shape[1] - 1
    place_E, passed_E = np.zeros(experts, np.uint16), np.zeros(experts, np.uint16)
    for layer in range(layers):
        for sequence in range(len(offsets) - 1):
            place_E[:] = experts
            for t in range(offsets[sequence], offsets[sequence + 1]):
                passed_E[:] = 0
                for k in range(top_k):
                    place = place_E[ids_LTK[layer, t, k]]
                    histogram_LD[layer, (place + 1) % (experts + 1)] += 1
                    for expert in range(experts):
                        passed_E[expert] += place_E[expert] < place
                for expert in range(experts):
                    place_E[expert] += passed_E[expert]
                for k in range(top_k):
                    place_E[ids_LTK[layer, t, k]] = k
