"""Section of calibration: whether a predictor's probabilities mean what they say, and how much they tell."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.evaluations import UNNAMED, Evaluation, Style, doubted, per_cent, per_cent_row, styles, words
from analysis.figures import Figure, Notice, Section, dots, dots_layout, grouped, line, line_layout, rounded
from analysis.tokens import readable

GREY = ("#7b828b", "#959ba3")
NO_PROBABILITIES = Notice(
    "None of the evaluated predictors gives probabilities; training fits them on the sequences of validation_fit:",
    ("expert-speculation train --shard_dir RUN --predictor interlayer --output_dir PREDICTOR",),
)
LEAD = (
    "A predictor may say how sure it is that an expert will be chosen; what is fetched above a threshold is right only "
    "where 70 % means seven times in ten. Every expert of a layer is one case for every token; the baselines only rank "
    "experts and say nothing of the kind."
)


def make(evaluations: Sequence[Evaluation], name: str = UNNAMED) -> Section:
    """Return the section of evaluations, checked and by rising horizon; the diagram is that of the first.

    Raises ConfigurationError where one is not what `evaluate --json` writes; the sentence calls it `name`.
    """
    with doubted(name):
        if not _calibrated(evaluations[0]):
            return Section("calibration", "Calibration", LEAD, notices=(NO_PROBABILITIES,))
        figures = (reliability_figure(evaluations[0]), error_figure(evaluations))
        return Section("calibration", "Calibration", LEAD, figures)


def reliability_figure(evaluation: Evaluation) -> Figure:
    """How often experts were chosen against the probability that they were given, in tenths of probability."""
    diagonal = line("as it should be", [0, 100], np.array([0.0, 100.0]), GREY, dash="dot", silent=True)
    data = [diagonal | {"showlegend": True}]
    rows: list[list[Any]] = []
    worst: tuple[float, str, Mapping[str, float]] | None = None
    for name, style, calibration in _calibrated(evaluation):
        bins = calibration["by_probability"]
        predicted, observed = (np.array([100 * each[key] for each in bins]) for key in ("predicted", "observed"))
        trace = line(
            name, rounded(predicted, 3), observed, style.colours, marker=style.marker, dash=style.dash, width=2
        )
        trace["customdata"] = [grouped(each["count"]) for each in bins]
        trace["hovertemplate"] = "said %{x:.1f} %, came true %{y:.1f} % of %{customdata} times"
        data.append(trace)
        rows += [
            [readable(name), each["count"], round(100 * each["predicted"], 2), round(100 * each["observed"], 2)]
            for each in bins
        ]
        for each in bins:
            gap = abs(each["predicted"] - each["observed"])
            if worst is None or gap > worst[0]:
                worst = (gap, readable(name), each)
    assert worst is not None
    layout = line_layout("probability that was given", "", height=420) | {"hovermode": "closest"}
    layout["xaxis"] |= {"ticksuffix": " %", "range": [-2, 102], "showgrid": True}
    layout["yaxis"] |= {"ticksuffix": " %", "range": [-2, 102], "title": {"text": "share that was chosen"}}
    return Figure(
        key="reliability",
        title="Reliability of the probabilities",
        sentence=(
            "On the diagonal, probabilities mean what they say; above it they are too timid, below too bold. Each "
            "point is a tenth of the probabilities; furthest off, "
            f"{worst[1]} says {100 * worst[2]['predicted']:.1f} % where {100 * worst[2]['observed']:.1f} % of "
            f"{grouped(int(worst[2]['count']))} came true."
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "cases", "probability given, mean, %", "chosen, %"],
        rows=rows,
        max_width=620,
    )


def error_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Expected calibration error per predictor, and per horizon where there are several."""
    several = len(evaluations) > 1
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for evaluation in reversed(evaluations):  # drawn from below
        horizon = int(evaluation["horizon"])
        for name, style, calibration in reversed(_calibrated(evaluation)):
            error = calibration["expected_calibration_error"]
            shown = f"{readable(name)}, {words(horizon)} ahead" if several else readable(name)
            data.append(dots(shown, [shown], per_cent([error]), style.colours, style.marker, "points"))
            rows.append([readable(name), horizon, *per_cent_row(error), round(100 * resolved_share(calibration), 2)])
    rows.reverse()
    layout = dots_layout("expected calibration error, percentage points", len(data)) | {"showlegend": False}
    layout["xaxis"]["rangemode"] = "tozero"
    best, most = min(rows, key=lambda row: row[2]), max(rows, key=lambda row: row[5])
    return Figure(
        key="calibration_error",
        title="Expected calibration error",
        sentence=(
            "How far probabilities are off on the mean over cases, in fifteen bins of equally many, with 95 % "
            f"intervals over sequences: the least is {best[2]:.2f} points, of {best[0]}. A small error alone says "
            "little, since giving every expert its mean share has none; so the table adds how much of the outcomes' "
            f"variance the probabilities resolve: 0 % for such shares, 100 % for certainty, {most[5]:.1f} % for "
            f"{most[0]}."
        ),
        spec={"data": data, "layout": layout},
        columns=["predictor", "layers ahead", "error, points", "95 % from", "to", "variance resolved, %"],
        rows=rows,
        max_width=820,
    )


def resolved_share(calibration: Mapping[str, Any]) -> float:
    """Return the resolution over the uncertainty of tenths of probability, 0 to 1 (Murphy 1973, "A new vector partition
    of the probability score"); within tenths nothing is resolved, so it is a lower bound."""
    count, observed = (
        np.array([float(each[key]) for each in calibration["by_probability"]]) for key in ("count", "observed")
    )
    mean = float(np.average(observed, weights=count))
    uncertainty = mean * (1 - mean)
    return float(np.average((observed - mean) ** 2, weights=count)) / uncertainty if uncertainty else 0.0


def _calibrated(evaluation: Evaluation) -> list[tuple[str, Style, Mapping[str, Any]]]:
    """Return the predictors that give probabilities, in the order of the legend."""
    found = [(name, style, evaluation["predictors"][name].get("calibration")) for name, style in styles(evaluation)]
    return [(name, style, calibration) for name, style, calibration in found if calibration]
