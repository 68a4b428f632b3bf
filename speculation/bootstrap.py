"""Intervals of micro-averages from a bootstrap over sequences.

Tokens of one sequence resemble each other, so resampling tokens would claim too much certainty; a resample draws as
many sequences as there are, with replacement, which is a row of multinomial weights. Equal seeds give equal resamples,
so the differences of two predictors' samples are paired.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK_WEIGHTS = 1 << 22  # weights held at once: 32 MiB
LEVEL = 0.95


def resampled_means(sums_SM: Floats, tokens_S: Floats, resamples: int, seed: int) -> Floats:
    """Micro-averages of `resamples` resamples, (B, M): weighted sums over sequences divided by weighted tokens."""
    parts = [
        (weights_BS @ sums_SM) / (weights_BS @ tokens_S)[:, None]
        for weights_BS in resample_weights(len(tokens_S), resamples, np.random.default_rng(seed))
    ]
    return np.concatenate(parts) if parts else np.empty((0, sums_SM.shape[1]))


def interval(value: float, samples_B: Floats) -> dict[str, float]:
    """The value with the central 95 % of its resamples; the value thrice where there are no resamples."""
    if len(samples_B) == 0:
        return {"value": value, "low": value, "high": value}
    low, high = np.quantile(samples_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def resample_weights(sequences: int, resamples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Rows of multinomial weights (R, S), `resamples` of them in chunks of bounded size."""
    rows = max(1, CHUNK_WEIGHTS // max(sequences, 1))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        yield generator.multinomial(sequences, np.full(sequences, 1 / sequences), size=count).astype(np.float64)
