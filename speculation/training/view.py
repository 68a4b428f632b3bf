"""A trace folder as a training may see it: some data sets only, and of its train split only so many tokens.

Every predictor's `fit` reads through it, so that a limit holds for counts, weights and stacking alike.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from traces.reader import TraceDataset


class TrainingView(TraceDataset):
    """`dataset` without the data sets in `hold_out`, with just those in `only` where there are any.

    `train_tokens` keeps the first sequences of the train split in the order of `seed` until they have so many tokens:
    a smaller limit keeps a part of what a larger one keeps. Validation keeps its size, so learning curves compare.
    `limits` repeats these under the names of their options.
    Raises ConfigurationError on an unknown data set.
    """

    def __init__(
        self,
        dataset: TraceDataset,
        *,
        hold_out: Collection[str] = (),
        only: Collection[str] = (),
        train_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.shards, self.spec = dataset.shards, dataset.spec
        self.num_tokens, self.num_sequences = dataset.num_tokens, dataset.num_sequences
        self.__dict__["index"] = dataset.index  # fills the cached property: one pass over the folder serves both
        self._whole, self._hold_out, self._only = dataset, tuple(hold_out), tuple(only)
        self._limited_S = self._within(train_tokens, seed)
        self.limits = {
            "hold_out_dataset": sorted(hold_out),
            "only_dataset": sorted(only),
            "train_tokens": train_tokens,
        }

    def order(
        self,
        split: str = "all",
        *,
        hold_out: Collection[str] = (),
        only: Collection[str] = (),
        shuffle_seed: int | None = None,
    ) -> list[NDArray[np.int64]]:
        """As of the whole folder, without what is not to be seen."""
        allowed = [name for name in self._only if not only or name in only] if self._only else only
        if self._only and not allowed:
            return []
        held_out = (*self._hold_out, *hold_out)
        windows = self._whole.order(split, hold_out=held_out, only=allowed, shuffle_seed=shuffle_seed)
        kept = [window[self._limited_S[window]] for window in windows]
        return [window for window in kept if len(window)]

    def _within(self, train_tokens: int | None, seed: int) -> NDArray[np.bool_]:
        kept_S = np.ones(len(self.index), dtype=np.bool_)
        if train_tokens is None:
            return kept_S
        if train_tokens < 1:
            raise ConfigurationError(f"--train_tokens {train_tokens}: must be at least 1")
        windows = self._whole.order("train", hold_out=self._hold_out, only=self._only)
        places = np.random.default_rng(seed).permutation(np.concatenate([np.empty(0, np.int64), *windows]))
        before = np.cumsum(self.index.num_tokens_S[places]) - self.index.num_tokens_S[places]
        kept_S[places[before >= train_tokens]] = False
        return kept_S
