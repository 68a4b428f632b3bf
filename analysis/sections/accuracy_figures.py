"""Figures of accuracy: by layer, number of experts named, data set, position and horizon."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.evaluations import BASELINES, Evaluation, Style, leader, per_cent, per_cent_row, styles, words
from analysis.figures import (
    Figure,
    band,
    dots,
    dots_layout,
    error_bars,
    line,
    line_layout,
    listed,
    rounded,
    shortened,
    ticks,
)
from analysis.sections.accuracy_differences import difference_figure
from analysis.tokens import readable

SHOWN_DATASETS = 24  # with most tokens; the table holds all of them


def make(evaluations: Sequence[Evaluation]) -> Iterator[Figure]:
    """Yield the figures of the first evaluation, and of all of them where there are several horizons."""
    evaluation = evaluations[0]

    def known(part: str) -> bool:
        return any(scores.get(part) for scores in evaluation["predictors"].values())

    if known("by_layer"):
        yield layer_figure(evaluation)
    yield budget_figure(evaluation)
    if known("by_dataset"):
        yield dataset_figure(evaluation)
    if known("by_position"):
        yield position_figure(evaluation)
    if len(evaluations) > 1:
        yield horizon_figure(evaluations)
    if evaluation["differences"]:
        yield difference_figure(evaluation)


def layer_figure(evaluation: Evaluation) -> Figure:
    """Recall at K by layer, one line per predictor with its interval as a band."""
    budget = str(evaluation["top_k"])
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for name, style in styles(evaluation):
        by_layer = evaluation["predictors"][name].get("by_layer") or []
        points = [(entry["layer"], entry["recall"][budget]) for entry in by_layer if budget in entry.get("recall", {})]
        points = [(layer, metric) for layer, metric in points if metric and metric.get("value") is not None]
        layers, metrics = [layer for layer, _ in points], [metric for _, metric in points]
        rows += [[readable(name), layer, *per_cent_row(metric)] for layer, metric in points]
        if name not in BASELINES:
            _, low, high = per_cent(metrics)
            data += band(name, layers, low, high, style.colours)
        data.append(_curve(name, style, layers, metrics, bars=False))
    layout = line_layout("layer", "", height=400)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": f"recall at {budget}"}}
    layout["xaxis"] |= ticks(int(evaluation["num_layers"]), 16)
    horizon = int(evaluation["horizon"])
    lowest = "layer 0 is" if horizon == 1 else f"layers 0 to {horizon - 1} are"
    return Figure(
        key="accuracy_by_layer",
        title=f"Recall at {budget} experts, by layer",
        sentence=(
            f"The share of a layer's {budget} routed experts that a predictor names with {budget} guesses: coloured "
            f"lines are the predictors with 95 % bands, grey ones the baselines; {lowest} guessed from earlier tokens "
            f"alone.{_hardest_layer(evaluation, budget)}"
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "layer", "recall, %", "95 % from", "to"],
        rows=rows,
    )


def budget_figure(evaluation: Evaluation) -> Figure:
    """Recall against the number of experts a predictor may name."""
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for name, style in styles(evaluation):
        recall = evaluation["predictors"][name]["recall"]
        points = sorted((int(budget), metric) for budget, metric in recall.items() if metric)
        data.append(_curve(name, style, [budget for budget, _ in points], [metric for _, metric in points]))
        rows += [[readable(name), budget, *per_cent_row(metric)] for budget, metric in points]
    layout = line_layout("experts that may be named", "", height=360)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": "recall"}}
    layout["xaxis"] |= {"tickvals": sorted({row[1] for row in rows})}
    return Figure(
        key="accuracy_by_budget",
        title="Recall by budget",
        sentence=(
            "How much of the routed set is covered when more experts are fetched than the model uses: a steep line "
            f"means that the missing experts come next in the predictor's order.{_growth(rows, leader(evaluation))}"
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "experts named", "recall, %", "95 % from", "to"],
        rows=rows,
        max_width=820,
    )


def dataset_figure(evaluation: Evaluation) -> Figure:
    """Recall at K by data set, one dot with its interval per predictor."""
    budget = str(evaluation["top_k"])
    parts = {name: evaluation["predictors"][name].get("by_dataset") or {} for name, _ in styles(evaluation)}
    tokens = {dataset: part["tokens"] for by_dataset in parts.values() for dataset, part in by_dataset.items()}
    drawn = sorted(tokens, key=lambda dataset: -tokens[dataset])[:SHOWN_DATASETS]
    best = leader(evaluation)
    drawn.sort(key=lambda dataset: parts[best][dataset]["recall"][budget]["value"] if dataset in parts[best] else 0)
    data = []
    for name, style in styles(evaluation):
        known = [dataset for dataset in drawn if dataset in parts[name]]
        ends = per_cent([parts[name][dataset]["recall"][budget] for dataset in known])
        data.append(dots(name, [shortened(each, 30) for each in known], ends, style.colours, style.marker, "%"))
    layout = dots_layout(f"recall at {budget}", len(drawn))
    layout["xaxis"]["ticksuffix"] = " %"
    sentence = (
        "Each dot is a predictor's recall on the texts of one data set, each bar its 95 % interval over sequences."
    )
    if single := [readable(each) for each in drawn if parts[best].get(each, {}).get("sequences") == 1]:
        sentence += f" A single sequence has none ({listed(single)})."
    if len(parts[best]) > 1:
        low, high = (100 * parts[best][dataset]["recall"][budget]["value"] for dataset in (drawn[0], drawn[-1]))
        sentence += (
            f" {readable(best)} reaches from {low:.1f} % on {readable(drawn[0])} to {high:.1f} % on "
            f"{readable(drawn[-1])}."
        )
    if len(drawn) < len(tokens):
        sentence += f" The {len(drawn)} data sets with most tokens are drawn; the table holds all {len(tokens)}."
    return Figure(
        key="accuracy_by_dataset",
        title=f"Recall at {budget} experts, by data set",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["predictor", "data set", "sequences", "tokens", "recall, %", "95 % from", "to"],
        rows=[
            [readable(name), readable(each), part["sequences"], part["tokens"], *per_cent_row(part["recall"][budget])]
            for name, by_dataset in parts.items()
            for each, part in by_dataset.items()
        ],
        max_width=900,
    )


def position_figure(evaluation: Evaluation) -> Figure:
    """Recall at K by the token's position in its sequence, in the ranges of the evaluation."""
    metric = f"recall@{evaluation['top_k']}"
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    ranges: dict[str, None] = {}
    for name, style in styles(evaluation):
        by_position = evaluation["predictors"][name].get("by_position") or []
        names = [_range(part["first"], part["last"]) for part in by_position]
        ranges |= dict.fromkeys(names)
        if by_position:
            data.append(_curve(name, style, names, [part[metric] for part in by_position]))
        rows += [
            [readable(name), each, part["tokens"], *per_cent_row(part[metric])]
            for each, part in zip(names, by_position, strict=True)
        ]
    best = readable(leader(evaluation))
    own = [row for row in rows if row[0] == best] or rows
    first, last = own[0], own[-1]
    layout = line_layout("position in the sequence, from 0", "", height=340)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": metric.replace("@", " at ")}}
    layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": list(ranges)}
    return Figure(
        key="accuracy_by_position",
        title="Recall by position in the sequence",
        sentence=(
            "What a predictor gains as the text goes on: lines that rise learn from the tokens before. "
            f"{first[0]} reaches {first[3]:.1f} % at position {first[1]} and {last[3]:.1f} % at {last[1]}; where "
            "every text begins with the same token, the first is easy for all."
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "positions", "tokens", "recall, %", "95 % from", "to"],
        rows=rows,
        max_width=820,
    )


def horizon_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Recall at K against the number of layers ahead, over the layers that every horizon can reach."""
    budget = str(evaluations[0]["top_k"])
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for name, style in styles(evaluations[0]):
        points = [
            (int(evaluation["horizon"]), evaluation["predictors"][name]["recall"][budget])
            for evaluation in evaluations
            if name in evaluation["predictors"]
        ]
        data.append(_curve(name, style, [horizon for horizon, _ in points], [metric for _, metric in points]))
        rows += [[readable(name), horizon, *per_cent_row(metric)] for horizon, metric in points]
    horizons = [int(evaluation["horizon"]) for evaluation in evaluations]
    best = readable(leader(evaluations[0]))
    reached = [(row[1], row[2]) for row in rows if row[0] == best]
    layout = line_layout("layers ahead", "", height=340)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": f"recall at {budget}"}}
    layout["xaxis"] |= {"tickvals": horizons}
    return Figure(
        key="accuracy_by_horizon",
        title="Recall by horizon",
        sentence=(
            "The further ahead a predictor looks, the more time there is to fetch and the less it knows: "
            f"{best} goes from {reached[0][1]:.1f} % at {words(reached[0][0])} ahead to {reached[-1][1]:.1f} % at "
            f"{words(reached[-1][0])}. Each point is over the layers that have a layer so far below them."
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "layers ahead", "recall, %", "95 % from", "to"],
        rows=rows,
        max_width=820,
    )


def _curve(
    name: str, style: Style, x: Sequence[Any], metrics: Sequence[Mapping[str, float]], *, bars: bool = True
) -> dict[str, Any]:
    """Return a predictor's line, with its intervals as bars and in the text of its points."""
    ends = values, low, high = per_cent(metrics)
    trace = line(name, x, values, style.colours, marker=style.marker, dash=style.dash, width=style.width, group=name)
    trace["customdata"] = rounded(np.stack([low, high], axis=-1), 4) if metrics else []
    trace["hovertemplate"] = "%{y:.1f} %  [%{customdata[0]:.1f}, %{customdata[1]:.1f}]"
    return trace | ({"error_y": error_bars(ends)} if bars else {})


def _hardest_layer(evaluation: Evaluation, budget: str) -> str:
    """Return where the leading predictor does worst and best, among the layers that have one `horizon` below."""
    best = leader(evaluation)
    by_layer = evaluation["predictors"][best].get("by_layer") or []
    known = [entry for entry in by_layer if entry["layer"] >= evaluation["horizon"] and entry["recall"].get(budget)]
    if not known:
        return ""
    low, high = (choose(known, key=lambda entry: float(entry["recall"][budget]["value"])) for choose in (min, max))
    return (
        f" {readable(best)} does worst in layer {low['layer']} ({100 * low['recall'][budget]['value']:.1f} %), "
        f"best in layer {high['layer']} ({100 * high['recall'][budget]['value']:.1f} %)."
    )


def _growth(rows: Sequence[Sequence[Any]], name: str) -> str:
    """Return what naming more experts gains a predictor."""
    own = [row for row in rows if row[0] == readable(name)]
    if len(own) < 2:
        return ""
    return f" {own[0][0]} goes from {own[0][2]:.1f} % with {own[0][1]} to {own[-1][2]:.1f} % with {own[-1][1]}."


def _range(first: int, last: int | None) -> str:
    return f"{first} and later" if last is None else str(first) if last == first else f"{first}–{last}"
