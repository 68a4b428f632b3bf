"""Heatmaps of layers by experts side by side, in one colour scale, with what may be chance washed out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import DIVERGING, category_axis, label, rounded, shortened

ALPHA = 0.05  # false-discovery rate below which a cell is shown in full colour
CLEAR = "rgba(0,0,0,0)"
VEILS = ("rgba(252,251,249,0.74)", "rgba(20,23,26,0.74)")  # the page's paper, light and dark
ROW_GAP = 60  # px between rows of panels, for ticks and the next title
MAX_COLUMNS = 4


def small_multiples(
    names: Sequence[str], points_PLE: NDArray[np.float64], q_PLE: NDArray[np.float64]
) -> tuple[dict[str, Any], int]:
    """Return a specification with one panel per name, differences in percentage points, and its least width in px.

    Cells with q of ALPHA or more lie under a veil, and so do panels whose q is NaN because they were not tested.
    """
    panels, num_layers, num_experts = points_PLE.shape
    columns = min(panels, MAX_COLUMNS)
    rows = -(-panels // columns)
    tested_P = np.array([bool(np.isfinite(q_LE).any()) for q_LE in q_PLE], dtype=bool)
    scaled_PLE = points_PLE[tested_P] if tested_P.any() else points_PLE
    limit = float(np.quantile(np.abs(scaled_PLE), 0.99)) or 1.0  # the strongest are cut, so that the others show
    height = float(np.clip(num_layers * 9, 110, 260))
    plot_height = rows * height + (rows - 1) * ROW_GAP
    gap_x, gap_y = 0.022, ROW_GAP / plot_height
    width, share_y = (1 - gap_x * (columns - 1)) / columns, height / plot_height
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": round(plot_height) + 76,
        "margin": {"l": 44, "r": 10, "t": 30, "b": 46},
        "coloraxis": {
            "cmin": -limit,
            "cmax": limit,
            "colorscale": DIVERGING[0],
            "colorbar": {"ticksuffix": " pt", "thickness": 10, "outlinewidth": 0, "tickformat": "+.3~g"},
        },
        "annotations": [],
        "meta": {"dark": {"coloraxis.colorscale": DIVERGING[1]}},
    }
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        suffix = "" if place == 0 else str(place + 1)
        left, top = column * (width + gap_x), 1 - row * (share_y + gap_y)
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        panel: dict[str, Any] = {
            "type": "heatmap",
            "z": rounded(points_PLE[place], 2),
            "coloraxis": "coloraxis",
            "hovertemplate": f"{label(name)}<br>layer %{{y}}, expert %{{x}}"
            "<br>%{z:+.2f} points, "
            + ("q = %{customdata:.3f}" if tested_P[place] else "not tested")
            + "<extra></extra>",
        }
        if tested_P[place]:
            panel["customdata"] = rounded(q_PLE[place], 3)
        data += [panel | axes, veil(q_PLE[place] < ALPHA) | axes]
        layout[f"xaxis{suffix}"] = category_axis(num_experts, 6) | {
            "domain": [left, left + width],
            "anchor": f"y{suffix}",
            "title": {"text": "expert" if place + columns >= panels else ""},
        }
        layout[f"yaxis{suffix}"] = category_axis(num_layers, 5) | {
            "domain": [max(0.0, top - share_y), top],
            "anchor": f"x{suffix}",
            "autorange": "reversed",
            "showticklabels": column == 0,
            "title": {"text": "layer" if column == 0 else ""},
        }
        layout["annotations"].append(panel_title(name, left, top))
    return {"data": data, "layout": layout}, 170 * columns


def panel_title(name: str, left: float, top: float) -> dict[str, Any]:
    """Return the annotation that stands above a panel, whose upper left corner is given in paper coordinates."""
    return {
        "text": f"<b>{label(shortened(name, 30))}</b>",
        "x": left,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "borderpad": 0,
        "align": "left",  # the page gives it the panel's width
        "yshift": 3,
    }


def veil(clear: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a heatmap that washes out every cell of the one below it which is not `clear`."""
    return {
        "type": "heatmap",
        "z": (~clear).astype(int).tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, CLEAR], [0.5, CLEAR], [0.5, VEILS[0]], [1, VEILS[0]]],
        "showscale": False,
        "hoverinfo": "skip",
        "meta": {"dark": {"colorscale": [[0, CLEAR], [0.5, CLEAR], [0.5, VEILS[1]], [1, VEILS[1]]]}},
    }
