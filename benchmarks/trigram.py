"""An interpolated trigram model (Kneser-Ney, one discount): what a small language model must beat to be called trained.

Kneser and Ney 1995; the interpolated form of Chen and Goodman 1998, section 4.1.6. Every order is interpolated with the
one below, down to the uniform distribution, so that no token has probability zero.
"""

import numpy as np
from numpy.typing import NDArray

DISCOUNT = 0.75


class Trigram:
    """Counts of a token stream; `log_probabilities` scores another one.

    Args:
        documents: int arrays of token ids; histories do not cross documents.
        vocabulary: number of token ids V; at most 2^21, so that three fit one 64-bit key.
    """

    def __init__(self, documents: list[NDArray[np.int32]], vocabulary: int) -> None:
        self.V = vocabulary
        trigrams, counts = np.unique(np.concatenate([self._keys(d) for d in documents]), return_counts=True)
        bigram_types = trigrams % self.V**2
        pairs, left_contexts = np.unique(bigram_types, return_counts=True)
        self._orders = [
            _Order(trigrams, counts, self.V),
            _Order(pairs, left_contexts, self.V),
            _Order(*np.unique(pairs % self.V, return_counts=True), self.V),
        ]

    def log_probabilities(self, document: NDArray[np.int32]) -> NDArray[np.float64]:
        """Natural-log probability of each token after the first, float64 [T - 1]."""
        keys = self._keys(document)
        probability = np.full(len(keys), 1 / self.V)
        for order, modulus in zip(reversed(self._orders), (self.V, self.V**2, self.V**3), strict=True):
            probability = order.interpolate(keys % modulus, probability)
        return np.log(probability)

    def _keys(self, document: NDArray[np.int32]) -> NDArray[np.int64]:
        tokens = document.astype(np.int64)
        before = np.concatenate([tokens[:1], tokens[:-2]])
        return np.asarray((before * self.V + tokens[:-1]) * self.V + tokens[1:])


class _Order:
    """One order's n-grams with their (continuation) counts, and totals by history."""

    def __init__(self, keys: NDArray[np.int64], counts: NDArray[np.int64], vocabulary: int) -> None:
        self.keys, self.counts, self.V = keys, counts, vocabulary
        histories = keys // vocabulary
        self.histories, first = np.unique(histories, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.types = np.diff(np.append(first, len(keys)))

    def interpolate(self, keys: NDArray[np.int64], lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Discounted relative frequency plus the mass set free, spread as the lower order says."""
        count = _look_up(self.keys, self.counts, keys)
        total = _look_up(self.histories, self.totals, keys // self.V)
        types = _look_up(self.histories, self.types, keys // self.V)
        seen = total > 0
        total = np.maximum(total, 1)
        mixed = np.maximum(count - DISCOUNT, 0) / total + DISCOUNT * types / total * lower
        return np.where(seen, mixed, lower)


def _look_up(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
