"""What one live prediction costs: it runs beside the model, and a guess that comes late fetches nothing."""

from __future__ import annotations

import numpy as np

from groundwork.progress import log
from speculation.features import RoutingBatch
from speculation.latency import decode_timed
from speculation.predictor import OPTIONAL_COLUMNS, Predictor
from traces.reader import TraceDataset

# Microseconds of predicting and observing one layer of gpt-oss-20b, on one core of an AMD EPYC, from the table "Speed"
# in docs/predictors.md (benchmarks/prediction_speed.py).
MEASURED_US = {"statistics": 70.0, "interlayer": 153.0, "ensemble": 364.0}
SECONDS = 3.0  # most that a measurement here may take


def prediction_us(predictor: Predictor, dataset: TraceDataset, split: str, horizon: int, *, measure: bool) -> float:
    """Return microseconds per layer of a live prediction: as documented, or measured here where asked or unknown."""
    if not measure and predictor.name in MEASURED_US:
        return MEASURED_US[predictor.name]
    found = _measured(predictor, dataset, split, horizon)
    log(
        f"{predictor.name}: a live prediction takes {found:.0f} us here; give it again with --prediction_us {found:.0f}"
    )
    return found


def _measured(predictor: Predictor, dataset: TraceDataset, split: str, horizon: int) -> float:
    """Decode the first sequence of a split live and return the sum of the medians."""
    columns = sorted(set(predictor.sees(dataset.available)) & OPTIONAL_COLUMNS)
    batch = RoutingBatch.from_sequences([next(dataset.sequences(split, columns))], dataset.spec)
    predict, observe = decode_timed(predictor, batch, horizon, most_s=SECONDS)
    return float(np.median(predict) + np.median(observe))
