"""How far two runs route the same text to the same experts: token by token, layer by layer, summed per sequence.

Of each token and layer: the share of the routed experts that both runs chose, whether the sets are equal, whether the
first choices are (where both runs know the order of a token's experts), and how far the weights lie apart, as half the
sum of absolute differences over experts of weights scaled to sum 1: 0 for equal weights, 1 where no expert is shared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculation.bootstrap import interval, resampled_means
from traces.schema import SequenceTrace, TraceSpec

Floats = NDArray[np.float64]


@dataclass
class Agreement:
    """Per-sequence sums of M measures, over texts in two runs of the same L and E; memory S x L x M."""

    first: TraceSpec
    second: TraceSpec
    sums: list[Floats] = field(default_factory=list)  # (L, M) of each sequence
    tokens: list[int] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)

    @property
    def measures(self) -> list[str]:
        """Return the names of what both runs allow to compare, in the order of the sums."""
        both_ordered = self.first.expert_order == self.second.expert_order == "weight"
        both_weighted = "weights" in self.first.store and "weights" in self.second.store
        allowed = {
            "shared": True,
            "exact_set": self.first.top_k == self.second.top_k,
            "first_choice": both_ordered,
            "weight_distance": both_weighted,
        }
        return [name for name in allowed if allowed[name]]

    def add(self, first: SequenceTrace, second: SequenceTrace) -> None:
        """Add one text in both runs; ValueError where the two have other lengths."""
        if first.num_tokens != second.num_tokens:
            raise ValueError(f"{first.num_tokens} tokens against {second.num_tokens}: not the same text")
        self.sums.append(self._sums(first, second))
        self.tokens.append(first.num_tokens)
        self.datasets.append(first.dataset)

    def result(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Return every measure with its 95 % interval over sequences: the mean over layers, by layer, by data set."""
        sums_SLM, tokens_S = np.stack(self.sums), np.array(self.tokens, dtype=np.float64)
        by_layer = _intervals(sums_SLM, tokens_S, self.measures, resamples, seed)
        overall_S1M = sums_SLM.mean(axis=1, keepdims=True)
        by_dataset = {}
        for name in sorted(set(self.datasets)):
            own_S = np.array([each == name for each in self.datasets])
            (means,) = _intervals(overall_S1M[own_S], tokens_S[own_S], self.measures, resamples, seed)
            by_dataset[name] = {"sequences": int(own_S.sum()), "tokens": int(tokens_S[own_S].sum()), **means}
        return {
            "sequences": len(tokens_S),
            "tokens": int(tokens_S.sum()),
            **_intervals(overall_S1M, tokens_S, self.measures, resamples, seed)[0],
            "by_layer": [{"layer": layer, **means} for layer, means in enumerate(by_layer)],
            "by_dataset": by_dataset,
        }

    def _sums(self, first: SequenceTrace, second: SequenceTrace) -> Floats:
        """Return the sums over tokens, (L, M)."""
        ids_KTL = np.ascontiguousarray(np.moveaxis(first.expert_ids_TLK, 2, 0))
        others_KTL = np.ascontiguousarray(np.moveaxis(second.expert_ids_TLK, 2, 0))
        same = {(k, j): ids_TL == others_KTL[j] for k, ids_TL in enumerate(ids_KTL) for j in range(len(others_KTL))}
        shared_TL = sum(same.values(), np.zeros(ids_KTL.shape[1:], dtype=np.uint16))
        fewest = min(self.first.top_k, self.second.top_k)
        values: dict[str, NDArray[Any]] = {"shared": shared_TL, "exact_set": shared_TL == fewest}
        values["first_choice"] = same[0, 0]
        if "weight_distance" in self.measures:
            assert first.routing_weights_TLK is not None
            assert second.routing_weights_TLK is not None
            values["weight_distance"] = weight_distance(first.routing_weights_TLK, second.routing_weights_TLK, same)
        sums_LM = np.stack([values[name].sum(axis=0, dtype=np.float64) for name in self.measures], axis=-1)
        sums_LM[:, self.measures.index("shared")] /= fewest
        return sums_LM


def weight_distance(
    first_TLK: NDArray[np.float16], second_TLK: NDArray[np.float16], same: Mapping[tuple[int, int], NDArray[np.bool_]]
) -> NDArray[np.float32]:
    """Return half the sum over experts of the absolute differences of two tokens' weights, [T, L].

    `same[k, j]` [T, L] says where the k-th expert of the first is the j-th of the second. What is not finite is 0.
    """
    first_KTL, second_KTL = _scaled(first_TLK), _scaled(second_TLK)
    distance_TL = np.zeros_like(first_KTL[0])
    for k, own_TL in enumerate(first_KTL):
        partner_TL = sum((second_KTL[j] * same[k, j] for j in range(len(second_KTL))), np.zeros_like(own_TL))
        distance_TL += np.abs(own_TL - partner_TL)
    for j, other_TL in enumerate(second_KTL):
        shared_TL = np.logical_or.reduce([same[k, j] for k in range(len(first_KTL))])
        distance_TL += other_TL * ~shared_TL
    return np.asarray(distance_TL / 2)


def expected_share(counts_RLE: NDArray[np.int64], tokens: int) -> Floats:
    """Return the share of routed experts that two runs (R) would both choose if they chose apart from each other, (L,).

    Each expert would be chosen by both as often as the product of how often each run chooses it.
    """
    often_RLE = counts_RLE / tokens
    fewest_L = often_RLE.sum(axis=-1).min(axis=0)
    return np.asarray(often_RLE.prod(axis=0).sum(axis=-1) / fewest_L)


def _scaled(weights_TLK: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return weights [K, T, L] that sum to 1 over a token's experts."""
    weights_KTL = np.ascontiguousarray(np.moveaxis(weights_TLK, 2, 0)).astype(np.float32)
    np.nan_to_num(weights_KTL, copy=False, posinf=0.0, neginf=0.0)
    return np.asarray(weights_KTL / np.maximum(weights_KTL.sum(axis=0), 1e-6))


def _intervals(
    sums_SLM: Floats, tokens_S: Floats, measures: Sequence[str], resamples: int, seed: int
) -> list[dict[str, dict[str, float]]]:
    """Return, per layer, each measure with its interval."""
    flat_SX = sums_SLM.reshape(len(sums_SLM), -1)
    samples_BX = resampled_means(flat_SX, tokens_S, resamples, seed)
    values_X = flat_SX.sum(axis=0) / tokens_S.sum()
    each = [interval(float(value), samples_BX[:, place]) for place, value in enumerate(values_X)]
    rows = [each[start : start + len(measures)] for start in range(0, len(each), len(measures))]
    return [dict(zip(measures, row, strict=True)) for row in rows]
