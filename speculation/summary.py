"""The figures of an evaluation, with intervals, from what its pass summed: by layer, data set and position too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speculation.bootstrap import Floats, interval, resampled_means
from speculation.metrics import POSITIONS, budgets, chance_values
from speculation.predictor import RoutingShape


@dataclass(frozen=True)
class Summary:
    """Turns per-sequence sums into the figures of the result."""

    shape: RoutingShape
    horizon: int
    names: list[str]
    moe_layers: tuple[int, ...]
    resamples: int
    seed: int

    def of(self, sums_SLM: Floats, tokens_S: Floats) -> dict[str, Any]:
        """Headline, all_layers and by_layer of one predictor."""
        groups = [sums_SLM[:, self.horizon :].mean(axis=1), sums_SLM.mean(axis=1), *np.moveaxis(sums_SLM, 1, 0)]
        values = self._intervals(np.stack(groups, axis=1), tokens_S)
        return self._assemble([self._figures(group) for group in values])

    def of_part(self, sums_SLM: Floats, tokens_S: Floats, chosen_S: np.ndarray) -> dict[str, Any]:
        """Headline figures over some of the sequences."""
        headline_SM = sums_SLM[chosen_S, self.horizon :].mean(axis=1)
        (group,) = self._intervals(headline_SM[:, None, :], tokens_S[chosen_S])
        return {"sequences": int(chosen_S.sum()), "tokens": int(tokens_S[chosen_S].sum()), **self._figures(group)}

    def of_chance(self) -> dict[str, Any]:
        """The same for a random ranking, exactly."""
        return self._assemble([self._chance() for _ in range(2 + self.shape.num_layers)])

    def chance_by_dataset(self, datasets: Sequence[str], tokens_S: Floats) -> dict[str, Any]:
        """Headline figures of a random ranking for each data set."""
        chosen = {name: np.array([each == name for each in datasets]) for name in sorted(set(datasets))}
        return {
            name: {"sequences": int(chosen_S.sum()), "tokens": int(tokens_S[chosen_S].sum()), **self._chance()}
            for name, chosen_S in chosen.items()
        }

    def by_position(self, sums_SP: Floats, tokens_SP: Floats) -> list[dict[str, Any]]:
        """Headline recall@K of the tokens in each range of positions, counted from the sequence's first token."""
        ranges = []
        for column, (first, stop) in enumerate(zip(POSITIONS, (*POSITIONS[1:], None), strict=True)):
            there_S = tokens_SP[:, column] > 0
            tokens_S = tokens_SP[there_S, column]
            if len(tokens_S) == 0:
                continue
            sums_S1 = sums_SP[there_S, column, None]
            samples_B = resampled_means(sums_S1, tokens_S, self.resamples, self.seed)[:, 0]
            recall = interval(float(sums_S1.sum() / tokens_S.sum()), samples_B)
            last = None if stop is None else stop - 1
            ranges.append(
                {"first": first, "last": last, "tokens": int(tokens_S.sum()), f"recall@{self.shape.top_k}": recall}
            )
        return ranges

    def differences(self, sums: Mapping[str, Floats], tokens_S: Floats, given: list[str]) -> list[dict[str, Any]]:
        """Paired differences in recall@K of every given predictor to every other predictor and chance."""
        metric = f"recall@{self.shape.top_k}"
        column = self.names.index(metric)
        chance = chance_values(self.shape, [metric])[0]
        values: dict[str, float] = {}
        samples: dict[str, Floats] = {}
        for name, sums_SLM in sums.items():
            headline_S1 = sums_SLM[:, self.horizon :, column].mean(axis=1)[:, None]
            values[name] = float(headline_S1.sum() / tokens_S.sum())
            samples[name] = resampled_means(headline_S1, tokens_S, self.resamples, self.seed)[:, 0]
        values["chance"], samples["chance"] = chance, np.full(self.resamples, chance)
        others = [*given, *(name for name in values if name not in given)]
        return [
            {"a": a, "b": b, "metric": metric, **interval(values[a] - values[b], samples[a] - samples[b])}
            for a in given
            for b in others
            if a != b
        ]

    def _intervals(self, sums_SGM: Floats, tokens_S: Floats) -> list[list[dict[str, float]]]:
        sequences, groups, metrics = sums_SGM.shape
        flat_SX = sums_SGM.reshape(sequences, groups * metrics)
        values_X = flat_SX.sum(axis=0) / tokens_S.sum()
        samples_BX = resampled_means(flat_SX, tokens_S, self.resamples, self.seed)
        each = [interval(float(value), samples_BX[:, i]) for i, value in enumerate(values_X)]
        return [each[i * metrics : (i + 1) * metrics] for i in range(groups)]

    def _chance(self) -> dict[str, Any]:
        empty = np.empty(0)
        return self._figures([interval(value, empty) for value in chance_values(self.shape, self.names)])

    def _figures(self, each: list[dict[str, float]]) -> dict[str, Any]:
        by_name = dict(zip(self.names, each, strict=True))
        top_n = {name.removeprefix("top_"): by_name[name] for name in self.names if name.startswith("top_")}
        return {
            "top_n_accuracy": top_n or None,
            "recall": {str(b): by_name[f"recall@{b}"] for b in budgets(self.shape)},
            **{name: by_name[name] for name in ("hit_at_1", "exact_set", "any_hit")},
        }

    def _assemble(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        headline, all_layers, *by_layer = groups
        layers = [
            {"layer": layer, "model_layer": model_layer, **figures}
            for layer, (model_layer, figures) in enumerate(zip(self.moe_layers, by_layer, strict=True))
        ]
        return {**headline, "all_layers": all_layers, "by_layer": layers}
