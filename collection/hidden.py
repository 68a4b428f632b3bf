"""Which tokens carry their router inputs: an even share of the run, chosen by the seed and the place in the plan."""

import itertools

import numpy as np
from numpy.typing import NDArray


class HiddenSample:
    """Every 1/`fraction`-th token of the run, counted over all sequences in order from a random start.

    So any stretch of tokens, such as a row group, has its share to within one, which bounds what it takes in memory.
    """

    def __init__(self, num_tokens_S: list[int], fraction: float, seed: int) -> None:
        self._first_S = list(itertools.accumulate(num_tokens_S, initial=0))
        self._fraction = fraction
        self._start = float(np.random.default_rng([seed, len(num_tokens_S)]).random())

    def positions(self, sequence_id: int) -> NDArray[np.int64]:
        """Return the chosen positions of a sequence, in order."""
        places = np.arange(self._first_S[sequence_id], self._first_S[sequence_id + 1] + 1)
        return np.flatnonzero(np.diff(np.floor(self._start + self._fraction * places)))
