"""How much a selection at one layer tells about a selection at another, for all pairs of layers up to a distance.

A selection is one of a token's K experts, drawn evenly; so the pair table of two layers counts all K x K pairs. A table
that is filled from finite text shows information even where there is none: the control fills a second table with the
same layers of two tokens from different sequences, and what it shows is subtracted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.counts.chunks import Chunk, Chunked, add_pairs
from analysis.counts.usage import information_bits

TABLE_BYTES = 64 * 2**20  # of all pair tables, and as many again of the control's


@dataclass(frozen=True, eq=False)
class LayerInformation:
    """Bits [L, L] at [lower layer, higher layer]; NaN on and below the diagonal and beyond the distance counted."""

    bits_LL: NDArray[np.float64]  # observed less control, at least 0
    observed_LL: NDArray[np.float64]
    control_LL: NDArray[np.float64]  # scaled to the number of tokens observed; 0 where the run has one sequence only
    distance: int
    tokens: int
    control_tokens: int


class LayerInformationCounts(Chunked):
    """Pair tables of layers up to `distance` apart and their control, each [distance, L, E, E] integers."""

    min_sequences = 2

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.num_layers, self.num_experts = num_layers, num_experts
        most = max(1, TABLE_BYTES // (8 * num_layers * num_experts**2))
        self.distance = min(num_layers - 1, most)
        shape = (self.distance, num_layers, num_experts, num_experts)
        self._tables, self._control = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self.tokens = self.control_tokens = 0

    def information(self) -> LayerInformation | None:
        """Return the information; None for a model of one layer."""
        self.flush()
        if self.distance < 1:
            return None
        observed_LL, control_LL = self._bits(self._tables), self._bits(self._control)
        # the excess of an empty relation falls with the number of tokens (Miller 1955, Panzeri and Treves 1996)
        control_LL *= self.control_tokens / max(self.tokens, 1)
        return LayerInformation(
            bits_LL=np.maximum(observed_LL - control_LL, 0.0),
            observed_LL=observed_LL,
            control_LL=control_LL,
            distance=self.distance,
            tokens=self.tokens,
            control_tokens=self.control_tokens,
        )

    def _count(self, chunk: Chunk) -> None:
        ids_LTK, tokens = chunk.ids_LTK, len(chunk.sequence_T)
        other_T = (np.arange(tokens) + tokens // 2) % tokens
        apart = np.flatnonzero(chunk.sequence_T != chunk.sequence_T[other_T])
        apart_LTK, other_LTK = ids_LTK.take(apart, axis=1), ids_LTK.take(other_T[apart], axis=1)
        for distance in range(1, self.distance + 1):
            lower, higher = slice(self.num_layers - distance), slice(distance, None)
            add_pairs(ids_LTK[lower], ids_LTK[higher], self._tables[distance - 1, lower])
            add_pairs(apart_LTK[lower], other_LTK[higher], self._control[distance - 1, lower])
        self.tokens += tokens
        self.control_tokens += len(apart)

    def _bits(self, tables: NDArray[np.int64]) -> NDArray[np.float64]:
        bits_LL = np.full((self.num_layers, self.num_layers), np.nan)
        for distance in range(1, self.distance + 1):
            lower = np.arange(self.num_layers - distance)
            bits_LL[lower, lower + distance] = information_bits(tables[distance - 1, : self.num_layers - distance])
        return bits_LL
