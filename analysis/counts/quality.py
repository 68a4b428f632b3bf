"""What a reader should know of a run before trusting its figures: sizes, lengths, splits, gaps and odd values."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from traces.schema import SequenceTrace

PHASE_NAMES = {0: "prefill", 1: "decode"}


class QualityCounts:
    """Counts of tokens by phase, unknown token ids and unusable weights, and the range of a token's weight sum."""

    def __init__(self) -> None:
        self.tokens = 0
        self.tokens_by_phase: Counter[int] = Counter()
        self.unknown_token_ids = 0
        self.non_finite_weights = 0
        self.weight_sum_low, self.weight_sum_high = np.inf, -np.inf

    def add(self, trace: SequenceTrace) -> None:
        """Add one sequence."""
        self.tokens += len(trace.token_ids_T)
        self.tokens_by_phase.update(dict(zip(*_counted(trace.phase_T), strict=True)))
        self.unknown_token_ids += int((trace.token_ids_T < 0).sum())
        weights_TLK = trace.routing_weights_TLK
        if weights_TLK is not None and weights_TLK.size:
            finite = np.isfinite(weights_TLK)
            self.non_finite_weights += int((~finite).sum())
            sums_TL = np.where(finite, weights_TLK, 0).astype(np.float32).sum(axis=-1)
            self.weight_sum_low = min(self.weight_sum_low, float(sums_TL.min()))
            self.weight_sum_high = max(self.weight_sum_high, float(sums_TL.max()))

    def summary(self, lengths: Sequence[int], splits: Sequence[str]) -> dict[str, Any]:
        """Return the counts as plain numbers, with the lengths and splits of all sequences."""
        lengths_S = np.asarray(lengths if len(lengths) else [0])
        known_weights = np.isfinite(self.weight_sum_low)
        return {
            "sequence_length": {
                "shortest": int(lengths_S.min()),
                "median": float(np.median(lengths_S)),
                "longest": int(lengths_S.max()),
            },
            "sequences_by_split": dict(sorted(Counter(splits).items())),
            "tokens_by_phase": {PHASE_NAMES.get(p, str(p)): n for p, n in sorted(self.tokens_by_phase.items())},
            "unknown_token_ids": self.unknown_token_ids,
            "non_finite_weights": self.non_finite_weights,
            "weight_sum": {"low": self.weight_sum_low, "high": self.weight_sum_high} if known_weights else None,
        }


def _counted(phase_T: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[list[int], list[int]]:
    values, counts = np.unique(phase_T, return_counts=True)
    return values.tolist(), counts.tolist()
