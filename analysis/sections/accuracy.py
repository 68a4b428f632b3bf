"""Section of accuracy: how well predictors do, from the evaluation's JSON, with the headline table and the pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.evaluations import BASELINES, UNNAMED, Evaluation, doubted, series_names, words
from analysis.figures import Notice, Section, grouped
from analysis.sections import accuracy_figures
from analysis.tokens import readable

NO_EVALUATION = Notice(
    "No predictor was evaluated for this report. Train one, then name its folder:",
    (
        "expert-speculation train --shard_dir RUN --predictor interlayer --output_dir PREDICTOR",
        "expert-speculation report --shard_dir RUN --predictor_dir PREDICTOR --output report.html",
    ),
)
ONE_HORIZON = Notice(
    "Accuracy further ahead is shown where the report is given several horizons:",
    ("expert-speculation report --shard_dir RUN --predictor_dir PREDICTOR --horizon 1 --horizon 2 --output FILE",),
)


def make(evaluations: Sequence[Evaluation], name: str = UNNAMED) -> Section:
    """Return the section of evaluations, checked and by rising horizon; without one, how to get it.

    Headline, tables and all figures but that of horizons are those of the first. Raises ConfigurationError where one
    is not what `evaluate --json` writes; the sentence calls it `name`.
    """
    if not evaluations:
        return Section("accuracy", "Prediction accuracy", lead="", notices=(NO_EVALUATION,))
    with doubted(name):
        return _section(evaluations)


def _section(evaluations: Sequence[Evaluation]) -> Section:
    evaluation = evaluations[0]
    horizon, split = int(evaluation["horizon"]), evaluation.get("split")
    where = (
        "" if split is None else f" of the {readable(split)} split" + (", held out from training" * (split == "test"))
    )
    lead = (
        f"{grouped(evaluation['tokens'])} tokens of {grouped(evaluation['sequences'])} sequences{where}, "
        f"{words(horizon)} ahead. The small numbers are 95 % intervals from a bootstrap over sequences."
    )
    return Section(
        key="accuracy",
        title="Prediction accuracy",
        lead=lead,
        figures=tuple(accuracy_figures.make(evaluations)),
        notices=() if len(evaluations) > 1 or evaluation["num_layers"] < 3 else (ONE_HORIZON,),
        headline=tuple(_headline(evaluation)),
        partial="accuracy.html.j2",
        values={
            "horizon": horizon,
            "top_k": int(evaluation["top_k"]),
            "notes": [readable(str(note), None) for note in evaluation.get("notes", [])],
            "scores": score_table(evaluation),
        },
        numbers={"evaluation": evaluation, "further_evaluations": list(evaluations[1:])},
    )


def _headline(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the recall at K of the best predictor and of the best baseline."""
    headline = []
    budget = str(evaluation["top_k"])
    for baseline in (False, True):
        recalls = {
            name: scores["recall"][budget]["value"]
            for name, scores in evaluation["predictors"].items()
            if (name in BASELINES) == baseline and scores["recall"].get(budget)
        }
        if not recalls:
            break
        best = max(recalls, key=lambda name: recalls[name])
        title = f"recall at {budget} of {readable(best)}" + (", the best baseline" if baseline else "")
        headline.append((title, f"{100 * recalls[best]:.1f} %"))
    return headline


def score_table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headline table: a row per predictor, a column per metric, in per cent, each column's best marked."""
    names = series_names(evaluation)
    budgets = sorted({int(budget) for name in names for budget in evaluation["predictors"][name]["recall"]})
    metrics = [(f"recall at\N{NO-BREAK SPACE}{budget}", "recall", str(budget)) for budget in budgets]
    metrics += [("exact set", "exact_set", ""), ("hit at 1", "hit_at_1", ""), ("any hit", "any_hit", "")]
    metrics += [
        (f"first in\N{NO-BREAK SPACE}top\N{NO-BREAK SPACE}{n}", "top_n_accuracy", str(n)) for n in (1, 3, 5, 10)
    ]
    columns, cells = [], []
    for title, key, inner in metrics:
        values = [_metric(evaluation["predictors"][name], key, inner) for name in names]
        known = [value["value"] for value in values if value]
        if known:
            columns.append(title)
            cells.append([value and {**_per_cent(value), "best": value["value"] == max(known)} for value in values])
    rows = [
        {
            "name": readable(name),
            "baseline": name in BASELINES,
            "sees": ", ".join(evaluation["predictors"][name].get("sees") or []) or "nothing",
            "cells": [column[row] for column in cells],
        }
        for row, name in enumerate(names)
    ]
    return {"columns": columns, "rows": rows}


def _metric(predictor: Mapping[str, Any], key: str, inner: str) -> Mapping[str, float] | None:
    value = predictor.get(key)
    if inner and value is not None:
        value = value.get(inner)
    return value if value and value.get("value") is not None else None


def _per_cent(metric: Mapping[str, float]) -> dict[str, float]:
    return {end: 100 * metric[end] for end in ("value", "low", "high")}
