"""Fitting a trained predictor's calibration curves on sequences that it has not learned from."""

from __future__ import annotations

import math

import torch

from groundwork.progress import Progress, log, progress
from speculation.calibration import PlattScaling
from speculation.ensemble import Ensemble
from speculation.features import packed_batches
from speculation.predictor import MAX_HORIZON, OPTIONAL_COLUMNS, Predictor
from traces.reader import TraceDataset

SPLIT = "validation_fit"
BATCH_TOKENS = 4096
FIT_SCORES = 1 << 25  # kept while fitting one horizon: 128 MiB


def calibrate(predictor: Predictor, dataset: TraceDataset) -> None:
    """Sets `calibration_` for every horizon that the traces allow; ensembles are calibrated as they are.

    Without sequences in SPLIT the predictor stays uncalibrated, and the log says so.
    """
    if isinstance(predictor, Ensemble):
        return
    tokens = sum(int(dataset.index.num_tokens_S[part].sum()) for part in dataset.order(SPLIT))
    if tokens == 0:
        log(f"no sequence is in split {SPLIT}, so {predictor.name} has scores but no probabilities")
        return
    spec = dataset.spec
    stored = spec.horizons if "lookahead" in predictor.requires else MAX_HORIZON
    stride = math.ceil(tokens * spec.num_layers * spec.num_experts / FIT_SCORES)
    columns = sorted(frozenset(predictor.sees(dataset.available)) & OPTIONAL_COLUMNS)
    horizons = range(1, min(MAX_HORIZON, stored, spec.num_layers - 1) + 1)
    for horizon in horizons:
        odds, ids = [], []
        bar: Progress[None] = progress(description=f"calibrating, {horizon} ahead", unit="tokens")
        with bar:
            for _, batch in packed_batches(dataset.sequences(SPLIT, columns), spec, BATCH_TOKENS):
                odds.append(predictor.log_odds(predictor.predict_scores(batch, horizon)[::stride]))
                ids.append(batch.expert_ids_TLK[::stride])
                bar.update(batch.num_tokens)
        predictor.calibration_[horizon] = PlattScaling.fit(torch.cat(odds), torch.cat(ids))
