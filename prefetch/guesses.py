"""What a prefetcher believes: for each token and layer, experts with the probability that they will be chosen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from groundwork.progress import Progress, progress
from prefetch.workload import Workload
from speculation.features import packed_batches
from speculation.predictor import OPTIONAL_COLUMNS, Predictor
from traces.reader import TraceDataset

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Guesses:
    """The likeliest experts first, (T, L, B); a probability below 0 ends a list."""

    ids_TLB: NDArray[np.uint16]
    p_TLB: NDArray[np.float32]

    def of(self, kept_T: NDArray[np.bool_]) -> Guesses:
        """Return the guesses for some of the tokens."""
        return Guesses(self.ids_TLB[kept_T], self.p_TLB[kept_T])

    def recall(self, expert_ids_TLK: NDArray[np.uint16], budget: int) -> float:
        """Return which part of the routed experts is among the first `budget` guesses, over all tokens and layers."""
        named = self.ids_TLB[:, :, None, :budget] == expert_ids_TLK[:, :, :, None]
        return float((named & (self.p_TLB[:, :, None, :budget] >= 0)).any(axis=3).mean())


def no_guesses(workload: Workload) -> Guesses:
    """Return empty lists."""
    tokens, layers = workload.expert_ids_TLK.shape[:2]
    return Guesses(np.zeros((tokens, layers, 1), np.uint16), np.full((tokens, layers, 1), -1, np.float32))


def perfect_guesses(workload: Workload) -> Guesses:
    """Return the router's own choices, certain."""
    ids_TLK = workload.expert_ids_TLK
    return Guesses(ids_TLK, np.ones(ids_TLK.shape, np.float32))


def predictor_guesses(
    dataset: TraceDataset, split: str, only: Collection[str], predictor: Predictor, horizon: int, width: int
) -> Guesses:
    """Ask a predictor about every token and layer of a split and keep its `width` best experts.

    Probabilities are the predictor's own; where it has none for this horizon, what its uncalibrated log-odds say, and
    of scores that are not log-odds K times each expert's share of a softmax, at most 1.
    """
    columns = sorted(set(predictor.sees(dataset.available)) & OPTIONAL_COLUMNS)
    ids, chances = [], []
    bar: Progress[None] = progress(description=f"asking {predictor.name}", unit="tokens")
    with bar:
        for _, batch in packed_batches(dataset.sequences(split, columns, only=only), dataset.spec, BATCH_TOKENS):
            scores_TLE = predictor.predict_scores(batch, horizon)
            p_TLE = predictor.probabilities(scores_TLE, horizon)
            if p_TLE is None:
                times = 1 if predictor.score_scale == "log_odds" else dataset.spec.top_k
                p_TLE = (times * torch.sigmoid(predictor.log_odds(scores_TLE))).clamp_max(1.0)
            ids_TLB = scores_TLE.topk(width, dim=2).indices
            ids.append(ids_TLB.numpy().astype(np.uint16))
            chances.append(p_TLE.gather(2, ids_TLB).clamp(0, 1).numpy().astype(np.float32))
            bar.update(batch.num_tokens)
    return Guesses(np.concatenate(ids), np.concatenate(chances))


class GradedGuesses:
    """A made-up prefetcher of any accuracy: at a share of all visits it is perfect, elsewhere it names experts blindly.

    Equal shares are right at equal visits, and a larger one at those too.
    """

    def __init__(self, workload: Workload, seed: int) -> None:
        generator = np.random.default_rng(seed)
        tokens, layers, top_k = workload.expert_ids_TLK.shape
        self._true_TLK = workload.expert_ids_TLK
        blind_TLE = generator.random((tokens, layers, workload.shape.num_experts), dtype=np.float32)
        self._blind_TLK = np.argpartition(blind_TLE, top_k - 1, axis=2)[:, :, :top_k].astype(np.uint16)
        self._rank_TL = generator.random((tokens, layers))

    def of_share(self, share: float) -> tuple[Guesses, float]:
        """Return the guesses that are perfect at `share` of the visits, K of them each, and their recall."""
        ids_TLK = np.where((self._rank_TL < share)[:, :, None], self._true_TLK, self._blind_TLK)
        guesses = Guesses(ids_TLK, np.ones(ids_TLK.shape, np.float32))
        recall = guesses.recall(self._true_TLK, ids_TLK.shape[2])
        return Guesses(ids_TLK, np.full(ids_TLK.shape, recall, np.float32)), recall
