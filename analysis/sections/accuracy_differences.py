"""The figure of accuracy in pairs: how much better one predictor is than another on the same sequences."""

from collections.abc import Mapping
from typing import Any

from analysis.evaluations import Evaluation, per_cent, per_cent_row
from analysis.figures import SERIES, Figure, dots, label, line_layout
from analysis.tokens import readable

NOT_SHOWN = "no difference shown"


def difference_figure(evaluation: Evaluation) -> Figure:
    """Forest plot of the paired differences in recall at K, or in whatever single metric was compared."""
    differences = once_per_pair(evaluation)
    wanted = f"recall@{evaluation['top_k']}"
    at_k = [entry for entry in differences if entry["metric"] == wanted] or differences
    names = [f"{label(entry['a'])} − {label(entry['b'])}" for entry in at_k]
    if any(entry["metric"] != at_k[0]["metric"] for entry in at_k):
        names = [f"{name}, {label(entry['metric'])}" for name, entry in zip(names, at_k, strict=True)]
    ends = _, low, high = per_cent(at_k)
    trace = dots("difference", [], ends, SERIES[0], "circle", "points") | {
        "y": names,
        "hovertemplate": "%{y}<br>%{x:+.2f} points  [%{customdata[0]:+.2f}, %{customdata[1]:+.2f}]<extra></extra>",
    }
    layout = line_layout("percentage points", "", height=80 + 34 * len(names)) | {"showlegend": False}
    layout["hovermode"] = "closest"
    layout["margin"] |= {"l": 30, "t": 8}
    reach = (min(0.0, float(low.min())), max(0.0, float(high.max())))
    margin = 0.04 * (reach[1] - reach[0]) or 1.0
    layout["xaxis"] |= {
        "range": [reach[0] - margin, reach[1] + margin],
        "showgrid": True,
        "zeroline": True,
        "zerolinewidth": 1.5,
        "tickformat": "+.3~g",
    }
    layout["yaxis"] |= {
        "range": [len(names) - 0.4, -0.6],  # the first on top, without the rooms that plotly leaves at both ends
        "showgrid": False,
        "automargin": True,
        "type": "category",
    }
    open_pairs = [entry for entry in at_k if verdict(entry) == NOT_SHOWN]
    return Figure(
        key="differences",
        title=f"Paired differences in {readable(at_k[0]['metric']).replace('@', ' at ')}",
        sentence=(
            "Each dot is a mean difference over the same sequences and each bar its 95 % interval: a predictor is "
            "better than another only where the bar clears the zero line, which "
            f"{len(open_pairs) or 'none'} of the {len(at_k)} {'fails' if len(open_pairs) == 1 else 'fail'} to do."
        ),
        spec={"data": [trace], "layout": layout},
        columns=["predictor", "against", "metric", "difference, points", "95 % from", "to", "so it is"],
        rows=[
            [*(readable(entry[key]) for key in ("a", "b", "metric")), *per_cent_row(entry), verdict(entry)]
            for entry in differences
        ],
        max_width=820,
    )


def verdict(difference: Mapping[str, Any]) -> str:
    """Return what may be concluded of the first predictor from the interval of a paired difference."""
    return "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else NOT_SHOWN


def once_per_pair(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    """Return the differences without those that an earlier one states the other way round."""
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for entry in evaluation["differences"]:
        if (entry["b"], entry["a"], entry["metric"]) not in seen:
            kept.append(entry)
        seen.add((entry["a"], entry["b"], entry["metric"]))
    return kept
