"""The shape of the report's figures: plain plotly specifications, each with its sentence and its table of numbers.

Colours are those of the light page; a trace's `meta["dark"]` lists what changes on the dark one, by attribute path, so
that the same specification serves both, and prints. Labels that come from data are escaped here, because plotly reads
`<b>`, `<a href>` and the like in any text.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.tokens import readable

Colours = tuple[str, str]  # on the light page, on the dark page
SERIES: tuple[Colours, ...] = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f58b3c"),
    ("#009e73", "#2fc79a"),
    ("#a5508a", "#dd92c2"),
)
SEQUENTIAL = ([[0, "#f4f1ea"], [0.25, "#c5d6e6"], [0.55, "#6a9fcb"], [0.8, "#2a6aa6"], [1, "#0c3a66"]],
              [[0, "#1d2126"], [0.25, "#21405f"], [0.55, "#2f73ad"], [0.8, "#72b0e2"], [1, "#d9ecfb"]])  # fmt: skip
DIVERGING = ([[0, "#0b5394"], [0.25, "#7fb0d8"], [0.5, "#f6f4ef"], [0.75, "#eba566"], [1, "#a84300"]],
             [[0, "#74b9f2"], [0.25, "#31658f"], [0.5, "#1f2328"], [0.75, "#965a24"], [1, "#ffab5e"]])  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A plotly specification with what a reader needs around it; rows of the table hold strings and rounded numbers."""

    key: str
    title: str
    sentence: str
    spec: dict[str, Any]
    columns: list[str]
    rows: list[list[Any]]
    max_width: int = 1080  # px
    min_width: int = 0  # px; on a narrower page the figure scrolls


def label(text: str) -> str:
    """Return text that plotly shows literally: nothing invisible in it, and none of its markup."""
    return html.escape(readable(text), quote=False)


def line(
    name: str, x: Sequence[int], y: NDArray[np.float64], colours: Colours, *, marker: str = "", dash: str = "solid",
    width: float = 2, group: str = "", silent: bool = False,
) -> dict[str, Any]:  # fmt: skip
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": label(name),
        "mode": "lines+markers" if marker else "lines",
        "x": list(x),
        "y": rounded(np.asarray(y), 5),
        "line": {"color": colours[0], "width": width, "dash": dash},
        "meta": {"dark": {"line.color": colours[1], "marker.color": colours[1], "error_y.color": colours[1]}},
    }
    if marker:
        trace["marker"] = {"color": colours[0], "size": 7, "symbol": marker}
    if group:
        trace["legendgroup"] = label(group)
    if silent:
        trace |= {"showlegend": False, "hoverinfo": "skip"}
    return trace


def heatmap(z: NDArray[np.float64], scale: str, **options: Any) -> dict[str, Any]:
    light, dark = SEQUENTIAL if scale == "sequential" else DIVERGING
    gap = 1 if z.size <= 2048 else 0
    return {
        "type": "heatmap",
        "z": rounded(z, 4),
        "colorscale": light,
        "xgap": gap,
        "ygap": gap,
        "meta": {"dark": {"colorscale": dark}},
        **options,
    }


def line_layout(x_title: str, y_title: str, height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 58, "r": 16, "t": 34, "b": 46},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
        "xaxis": {"title": {"text": x_title}, "showgrid": False, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "zeroline": False},
    }


def heatmap_layout(num_rows: int, num_columns: int) -> dict[str, Any]:
    return {
        "height": int(np.clip(num_rows * 24, 160, 640)) + 60,
        "margin": {"l": 48, "r": 10, "t": 8, "b": 46},
        "xaxis": category_axis(num_columns, 32) | {"title": {"text": "expert"}},
        "yaxis": category_axis(num_rows, 32) | {"title": {"text": "layer"}, "autorange": "reversed"},
    }


def category_axis(size: int, most: int) -> dict[str, Any]:
    return {"showgrid": False, "zeroline": False, "ticks": ""} | ticks(size, most)


def ticks(size: int, most: int) -> dict[str, Any]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1 << 20) if size / step <= most)
    return {"tickvals": list(range(0, size, step))}


def rounded(values: NDArray[Any], digits: int) -> list[Any]:
    """Nested lists of rounded numbers, None where not finite (JSON has no NaN)."""
    rounded = np.round(np.asarray(values, dtype=np.float64), digits)
    if np.isfinite(rounded).all():
        return list(rounded.tolist())
    blanked = rounded.astype(object)
    blanked[~np.isfinite(rounded)] = None
    return list(blanked.tolist())
