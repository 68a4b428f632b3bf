"""Whether scores mean what they say: reliability tables, expected calibration error, and a fit that makes them say it.

Scores become probabilities that an expert is in the set by one logistic curve per layer over their log-odds, which
changes no ranking. A tally sums, per sequence and fine bin of probability, how often, how sure and how
right the scores were; fine bins are joined to bins of equal mass at the end, so memory does not grow with tokens, and
sequences can be resampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from speculation.bootstrap import interval, resample_weights
from speculation.features import RoutingBatch, multi_hot

FINE_BINS = 480  # of log-odds, evenly from -12 to 12
LOG_ODDS = 12.0
BINS = 15  # Guo et al. 2017 (1706.04599)


def softmax_log_odds(logits_TLE: Tensor) -> Tensor:
    """Log-odds of the softmax over experts; unlike its log, they go on growing where one expert is all but certain."""
    shares_TLE = torch.log_softmax(logits_TLE.float(), dim=-1).clamp_max(-1e-6)
    return shares_TLE - (-torch.expm1(shares_TLE)).log()


@dataclass(frozen=True)
class PlattScaling:
    """Per layer the slope (positive) and offset of P(in the set) = sigmoid(slope * log-odds + offset); curves (L, 2).

    Platt 1999, one curve per layer.
    """

    curves_L2: Tensor

    @classmethod
    def fit(cls, odds_TLE: Tensor, expert_ids_TLK: Tensor) -> PlattScaling:
        """Fits on `Predictor.log_odds` of sequences that neither the predictor nor its figures have seen."""
        chosen_TLE = multi_hot(expert_ids_TLK, odds_TLE.shape[2])
        curves = [
            logistic(odds_TLE[:, layer].reshape(-1, 1), chosen_TLE[:, layer].flatten())
            for layer in range(odds_TLE.shape[1])
        ]
        curves_L2 = torch.stack(curves)
        curves_L2[:, 0].clamp_min_(1e-3)
        return cls(curves_L2)

    def probabilities(self, odds_TLE: Tensor) -> Tensor:
        """P(in the set), float32 (T, L, E), ranked as the log-odds are."""
        return torch.sigmoid(odds_TLE * self.curves_L2[:, :1] + self.curves_L2[:, 1:])


def logistic(features_XF: Tensor, chosen_X: Tensor) -> Tensor:
    """Weights and intercept of a logistic regression on standardised features, float32 (F + 1,); 0 for one class."""
    width = features_XF.shape[1]
    if chosen_X.min() == chosen_X.max():
        return torch.cat([torch.zeros(width), torch.tensor([20.0 if chosen_X[0] else -20.0])])
    mean_F, scale_F = features_XF.mean(dim=0), features_XF.std(dim=0).clamp_min(1e-6)
    model = LogisticRegression(solver="newton-cholesky", max_iter=50)
    model.fit(((features_XF - mean_F) / scale_F).numpy().astype(np.float64), chosen_X.numpy())
    weights_F = torch.from_numpy(model.coef_[0]).float() / scale_F
    return torch.cat([weights_F, torch.from_numpy(model.intercept_).float() - weights_F @ mean_F])


@dataclass
class ReliabilityTally:
    """Sums over one pass: for each sequence and fine bin of probability the count, predicted and observed sums."""

    sums: list[NDArray[np.float64]] = field(default_factory=list)  # (S, FINE_BINS, 3) of each batch

    def add(self, probabilities_TLE: Tensor, batch: RoutingBatch) -> None:
        """Takes a batch of whole sequences; mask layers by slicing both before."""
        chosen_TLE = multi_hot(batch.expert_ids_TLK, batch.num_experts).double()
        probability_TLE = probabilities_TLE.double()
        place_TLE = (torch.logit(probability_TLE, eps=1e-9) + LOG_ODDS) * (FINE_BINS / (2 * LOG_ODDS))
        bin_TLE = place_TLE.long().clamp(0, FINE_BINS - 1)
        bin_TLE += batch.sequence_of_token_T[:, None, None] * FINE_BINS
        sequences = len(batch.offsets) - 1
        sums_X3 = torch.zeros(sequences * FINE_BINS, 3, dtype=torch.float64)
        values_X3 = torch.stack([torch.ones_like(probability_TLE), probability_TLE, chosen_TLE], dim=-1).flatten(0, 2)
        sums_X3.index_add_(0, bin_TLE.flatten(), values_X3)
        self.sums.append(sums_X3.view(sequences, FINE_BINS, 3).numpy())

    def result(self, bins: int = BINS, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """`bins` of equal mass with counts, mean prediction and observed share, and the expected calibration error.

        `by_probability` has the same for ten equal ranges of probability, since most experts are all but impossible
        and fill most bins of equal mass. The error is the mean over cases of |predicted - observed| of their bin; its
        interval is from a bootstrap over sequences with the bins kept.
        """
        sums_SB3 = np.concatenate(self.sums) if self.sums else np.zeros((0, FINE_BINS, 3))
        total_B3 = sums_SB3.sum(axis=0)
        if total_B3[:, 0].sum() == 0:
            raise ValueError("no case was added")
        before_B = np.cumsum(total_B3[:, 0]) - total_B3[:, 0] / 2
        group_B = np.minimum((before_B / total_B3[:, 0].sum() * bins).astype(int), bins - 1)
        groups = [index for index in range(bins) if total_B3[group_B == index, 0].sum() > 0]
        joined_SG3 = np.stack([sums_SB3[:, group_B == index].sum(axis=1) for index in groups], axis=1)
        joined_G3 = joined_SG3.sum(axis=0)
        samples = [
            _calibration_error(np.tensordot(weights_RS, joined_SG3, axes=1))
            for weights_RS in resample_weights(len(joined_SG3), resamples, np.random.default_rng(seed))
        ]
        error = float(_calibration_error(joined_G3[None])[0])
        return {
            "expected_calibration_error": interval(error, np.concatenate(samples) if samples else np.empty(0)),
            "bins": _described(joined_G3),
            "by_probability": _described(_in_ranges(total_B3)),
        }


def _in_ranges(total_B3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fine bins joined by the tenth of probability that their mean prediction is in; those that hold a case."""
    counts_B = total_B3[:, 0]
    tenth_B = np.minimum(10 * total_B3[:, 1] / np.maximum(counts_B, 1), 9).astype(int)
    return np.stack(
        [total_B3[(tenth_B == tenth) & (counts_B > 0)].sum(axis=0) for tenth in np.unique(tenth_B[counts_B > 0])]
    )


def _described(sums_G3: NDArray[np.float64]) -> list[dict[str, float]]:
    return [
        {"count": int(count), "predicted": float(predicted / count), "observed": float(observed / count)}
        for count, predicted, observed in sums_G3
    ]


def _calibration_error(sums_RG3: NDArray[np.float64]) -> NDArray[np.float64]:
    counts_R = sums_RG3[..., 0].sum(axis=1)
    error_R: NDArray[np.float64] = np.abs(sums_RG3[..., 1] - sums_RG3[..., 2]).sum(axis=1) / counts_R
    return error_R
