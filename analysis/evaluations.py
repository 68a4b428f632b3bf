"""Evaluations as the sections on predictors read them: checked, by rising horizon, each predictor in its style.

An evaluation may come from a file that anyone wrote, so everything about it is doubted.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import SERIES
from groundwork.errors import ConfigurationError
from traces.schema import TraceSpec

Evaluation = Mapping[str, Any]

FORMAT_VERSION = 1  # of the evaluation JSON that can be shown
BASELINES = ("markov", "repeat", "frequency", "chance")
NONE = {"value": 0.0}
UNNAMED = "the evaluation"
BASELINE_STYLES = {  # name: (light colour, dark colour, dash, marker)
    "markov": ("#5b6169", "#b3b8be", "solid", "diamond-open"),
    "repeat": ("#7b828b", "#959ba3", "dash", "square-open"),
    "frequency": ("#969da5", "#7d848c", "dashdot", "triangle-up-open"),
    "chance": ("#b4b9bf", "#666d75", "dot", "x-thin-open"),
}
MARKERS = ("circle", "square", "diamond", "triangle-up")


@dataclass(frozen=True)
class Style:
    """How a predictor's line looks: trained ones coloured, baselines grey."""

    colours: tuple[str, str]  # light, dark
    marker: str
    dash: str
    width: float


def in_order(evaluations: Sequence[Evaluation], spec: TraceSpec, names: Sequence[str] = ()) -> list[Evaluation]:
    """Return the evaluations by rising horizon; `names` are what errors call them, such as their files.

    Raises ConfigurationError where one is none, is of another model or version, or they are not the same texts at
    different horizons.
    """
    names = names or [UNNAMED] * len(evaluations)
    horizons: dict[int, str] = {}
    for name, evaluation in zip(names, evaluations, strict=True):
        with doubted(name):
            for key, wanted in (
                ("format_version", FORMAT_VERSION),
                *((key, getattr(spec, key)) for key in ("num_layers", "num_experts", "top_k")),
            ):
                if evaluation[key] != wanted:
                    raise ConfigurationError(
                        f"{name} has {key} {evaluation[key]!r}, but {wanted} is needed here; "
                        "evaluate on traces of the same model"
                    )
            for key in ("split", "sequences", "tokens"):
                if evaluation.get(key) != evaluations[0].get(key):
                    raise ConfigurationError(
                        f"{name} has {key} {evaluation.get(key)!r}, {names[0]} {evaluations[0].get(key)!r}; "
                        "evaluate each --horizon on the same traces and split"
                    )
            horizon = int(evaluation["horizon"])
            if horizon in horizons:
                raise ConfigurationError(
                    f"{name} has the horizon {horizon}, and so has {horizons[horizon]}; give one for each --horizon"
                )
            horizons[horizon] = name
    return sorted(evaluations, key=lambda evaluation: int(evaluation["horizon"]))


@contextmanager
def doubted(name: str = UNNAMED, verb: str = "evaluate") -> Iterator[None]:
    """Turn what a malformed result of `verb` raises into one sentence, which calls it by its name."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ConfigurationError(
            f"{name} is not what 'expert-speculation {verb} --json' writes ({type(error).__name__}: {error}); "
            "write it anew"
        ) from error


def series_names(evaluation: Evaluation) -> list[str]:
    """Return the predictors of an evaluation in the order of the legend: trained ones first, baselines last."""
    names = list(evaluation["predictors"])
    return [n for n in names if n not in BASELINES] + [n for n in BASELINES if n in names]


def styles(evaluation: Evaluation) -> list[tuple[str, Style]]:
    """Return every predictor with its style, the same in every figure of the evaluation."""
    styled = []
    trained = 0
    for name in series_names(evaluation):
        if name in BASELINES:
            light, dark, dash, marker = BASELINE_STYLES[name]
            styled.append((name, Style((light, dark), marker, dash, 1.5)))
        else:
            colours, marker = SERIES[trained % len(SERIES)], MARKERS[trained % len(MARKERS)]
            styled.append((name, Style(colours, marker, "solid" if trained < len(SERIES) else "dash", 2.5)))
            trained += 1
    return styled


def leader(evaluation: Evaluation) -> str:
    """Return the predictor with the highest recall at K: the one that sentences name; a baseline only among such."""
    names = [name for name in series_names(evaluation) if name not in BASELINES] or series_names(evaluation)
    budget = str(evaluation["top_k"])
    return max(names, key=lambda name: float((evaluation["predictors"][name]["recall"].get(budget) or NONE)["value"]))


def per_cent(metrics: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.float64], ...]:
    """Return values, lower and upper ends of intervals in per cent."""
    return tuple(np.array([100 * metric[end] for metric in metrics]) for end in ("value", "low", "high"))


def per_cent_row(metric: Mapping[str, float]) -> list[float]:
    """Return the value, lower and upper end in per cent as a table shows them."""
    return [round(100 * metric[end], 2) for end in ("value", "low", "high")]


def words(horizon: int) -> str:
    """Return how far ahead a horizon is."""
    return "one layer" if horizon == 1 else f"{horizon} layers"
