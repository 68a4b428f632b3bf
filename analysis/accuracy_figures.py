"""Figures and tables of how well predictors do, from the evaluation's JSON: by layer, by budget, and in pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import SERIES, Figure, label, line, line_layout, rounded, ticks
from analysis.tokens import readable

BASELINES = ("markov", "repeat", "frequency", "chance")
BASELINE_STYLES = {  # name: (light colour, dark colour, dash, marker)
    "markov": ("#5b6169", "#b3b8be", "solid", "diamond-open"),
    "repeat": ("#7b828b", "#959ba3", "dash", "square-open"),
    "frequency": ("#969da5", "#7d848c", "dashdot", "triangle-up-open"),
    "chance": ("#b4b9bf", "#666d75", "dot", "x-thin-open"),
}
MARKERS = ("circle", "square", "diamond", "triangle-up")


def make(evaluation: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of an evaluation; the one of differences only where predictors were compared."""
    figures = [layer_figure(evaluation), budget_figure(evaluation)]
    return [*figures, difference_figure(evaluation)] if evaluation["differences"] else figures


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


def difference_table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the paired differences in percentage points with what may be concluded from each."""
    return [
        {
            **{key: readable(entry[key]) for key in ("a", "b", "metric")},
            **_per_cent(entry),
            "verdict": "better" if entry["low"] > 0 else "worse" if entry["high"] < 0 else "no difference shown",
        }
        for entry in _once_per_pair(evaluation)
    ]


def series_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the predictors of an evaluation in the order of the legend: trained ones first, baselines last."""
    names = list(evaluation["predictors"])
    return [n for n in names if n not in BASELINES] + [n for n in BASELINES if n in names]


def layer_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Recall at K by layer, one line per predictor with its interval as a band."""
    budget = str(evaluation["top_k"])
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for name, style in _styles(evaluation):
        by_layer = evaluation["predictors"][name].get("by_layer") or []
        points = [(entry["layer"], entry["recall"][budget]) for entry in by_layer if budget in entry.get("recall", {})]
        points = [(layer, metric) for layer, metric in points if metric and metric.get("value") is not None]
        layers = [layer for layer, _ in points]
        values, low, high = (np.array([100 * metric[end] for _, metric in points]) for end in ("value", "low", "high"))
        rows += [[readable(name), *_percent_row(layer, metric)] for layer, metric in points]
        if name not in BASELINES:
            data += _band(name, layers, low, high, style.colours)
        trace = line(
            name, layers, values, style.colours, marker=style.marker, dash=style.dash, width=style.width, group=name
        )
        trace["customdata"] = rounded(np.stack([low, high], axis=-1), 4) if points else []
        trace["hovertemplate"] = "%{y:.1f} %  [%{customdata[0]:.1f}, %{customdata[1]:.1f}]"
        data.append(trace)
    layout = line_layout("layer", "", height=400)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": f"recall at {budget}"}}
    layout["xaxis"] |= ticks(int(evaluation["num_layers"]), 16)
    return Figure(
        key="accuracy_by_layer",
        title=f"Recall at {budget} experts, by layer",
        sentence=(
            f"The share of a layer's {budget} routed experts that a predictor names with {budget} guesses: coloured "
            "lines are the predictors with 95 % bands, grey ones the baselines; layers below "
            f"{evaluation['horizon']} are guessed from earlier tokens alone."
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "layer", "recall, %", "95 % from", "to"],
        rows=rows,
    )


def budget_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Recall against the number of experts a predictor may name."""
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for name, style in _styles(evaluation):
        recall = evaluation["predictors"][name]["recall"]
        points = [(int(budget), metric) for budget, metric in recall.items() if metric]
        points.sort(key=lambda point: point[0])
        values, low, high = (np.array([100 * metric[end] for _, metric in points]) for end in ("value", "low", "high"))
        trace = line(
            name, [budget for budget, _ in points], values, style.colours, marker=style.marker, dash=style.dash,
            width=style.width,
        )  # fmt: skip
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": rounded(high - values, 5),
            "arrayminus": rounded(values - low, 5),
            "thickness": 1.2,
            "width": 3,
        }
        trace["customdata"] = rounded(np.stack([low, high], axis=-1), 4) if points else []
        trace["hovertemplate"] = "%{y:.1f} %  [%{customdata[0]:.1f}, %{customdata[1]:.1f}]"
        data.append(trace)
        rows += [[readable(name), *_percent_row(budget, metric)] for budget, metric in points]
    budgets = sorted({row[1] for row in rows})
    layout = line_layout("experts that may be named", "", height=360)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": "recall"}}
    layout["xaxis"] |= {"tickvals": budgets}
    return Figure(
        key="accuracy_by_budget",
        title="Recall by budget",
        sentence=(
            "How much of the routed set is covered when more experts are fetched than the model uses: a steep line "
            "means that the missing experts come next in the predictor's order."
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "experts named", "recall, %", "95 % from", "to"],
        rows=rows,
        max_width=820,
    )


def difference_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Forest plot of the paired differences in recall at K, or in whatever single metric was compared."""
    differences = _once_per_pair(evaluation)
    wanted = f"recall@{evaluation['top_k']}"
    at_k = [entry for entry in differences if entry["metric"] == wanted] or differences
    names = [f"{label(entry['a'])} − {label(entry['b'])}" for entry in at_k]
    if any(entry["metric"] != at_k[0]["metric"] for entry in at_k):
        names = [f"{name}, {label(entry['metric'])}" for name, entry in zip(names, at_k, strict=True)]
    value, low, high = (np.array([100 * entry[end] for entry in at_k]) for end in ("value", "low", "high"))
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": rounded(value, 3),
        "y": names,
        "marker": {"color": SERIES[0][0], "size": 9},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": rounded(high - value, 3),
            "arrayminus": rounded(value - low, 3),
            "thickness": 2,
            "width": 5,
            "color": SERIES[0][0],
        },
        "customdata": rounded(np.stack([low, high], axis=-1), 3),
        "hovertemplate": "%{y}<br>%{x:+.2f} points  [%{customdata[0]:+.2f}, %{customdata[1]:+.2f}]<extra></extra>",
        "meta": {"dark": {"marker.color": SERIES[0][1], "error_x.color": SERIES[0][1]}},
    }
    layout = line_layout("percentage points", "", height=80 + 34 * len(names)) | {"showlegend": False}
    layout["hovermode"] = "closest"
    layout["margin"]["l"] = 30
    reach = (min(0.0, float(low.min())), max(0.0, float(high.max())))
    margin = 0.04 * (reach[1] - reach[0]) or 1.0
    layout["xaxis"] |= {
        "range": [reach[0] - margin, reach[1] + margin],
        "showgrid": True,
        "zeroline": True,
        "zerolinewidth": 1.5,
        "tickformat": "+.3~g",
    }
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "automargin": True, "type": "category"}
    return Figure(
        key="differences",
        title=f"Paired differences in {label(at_k[0]['metric'])}",
        sentence=(
            "Each dot is a mean difference over the same sequences and each bar its 95 % interval: a predictor is "
            "better than another only where the bar clears the zero line."
        ),
        spec={"data": [trace], "layout": layout},
        columns=["predictor", "against", "metric", "difference, points", "95 % from", "to"],
        rows=[
            [readable(e["a"]), readable(e["b"]), e["metric"], *(round(100 * e[k], 2) for k in ("value", "low", "high"))]
            for e in differences
        ],
        max_width=820,
    )


@dataclass(frozen=True)
class _Style:
    colours: tuple[str, str]  # light, dark
    marker: str
    dash: str
    width: float


def _styles(evaluation: Mapping[str, Any]) -> list[tuple[str, _Style]]:
    styled = []
    trained = 0
    for name in series_names(evaluation):
        if name in BASELINES:
            light, dark, dash, marker = BASELINE_STYLES[name]
            styled.append((name, _Style((light, dark), marker, dash, 1.5)))
        else:
            colours, marker = (SERIES[trained % len(SERIES)], MARKERS[trained % len(MARKERS)])
            styled.append((name, _Style(colours, marker, "solid" if trained < len(SERIES) else "dash", 2.5)))
            trained += 1
    return styled


def _percent_row(first: Any, metric: Mapping[str, float]) -> list[Any]:
    return [first, *(round(100 * metric[end], 2) for end in ("value", "low", "high"))]


def _band(
    name: str, layers: Sequence[int], low: NDArray[np.float64], high: NDArray[np.float64], colours: tuple[str, str]
) -> list[dict[str, Any]]:
    """Two invisible lines with the interval filled between them."""
    light, dark = (f"rgba({int(c[1:3], 16)},{int(c[3:5], 16)},{int(c[5:7], 16)},0.18)" for c in colours)
    edge = ("rgba(0,0,0,0)", "rgba(0,0,0,0)")
    upper = line(name, layers, high, edge, width=0, group=name, silent=True)
    lower = line(name, layers, low, edge, width=0, group=name, silent=True) | {"fill": "tonexty", "fillcolor": light}
    lower["meta"] = {"dark": {"fillcolor": dark}}
    return [upper, lower]


def _once_per_pair(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the differences without those that an earlier one states the other way round."""
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for entry in evaluation["differences"]:
        if (entry["b"], entry["a"], entry["metric"]) not in seen:
            kept.append(entry)
        seen.add((entry["a"], entry["b"], entry["metric"]))
    return kept


def _metric(predictor: Mapping[str, Any], key: str, inner: str) -> Mapping[str, float] | None:
    value = predictor.get(key)
    if inner and value is not None:
        value = value.get(inner)
    return value if value and value.get("value") is not None else None


def _per_cent(metric: Mapping[str, float]) -> dict[str, float]:
    return {end: 100 * metric[end] for end in ("value", "low", "high")}
