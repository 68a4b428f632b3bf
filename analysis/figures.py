"""The shape of the report's figures: plain plotly specifications, each with its sentence and its table of numbers.

Colours are those of the light page; a trace's `meta["dark"]` lists what changes on the dark one, by attribute path, so
that the same specification serves both, and prints. Labels that come from data are escaped here, because plotly reads
`<b>`, `<a href>` and the like in any text.
"""

import base64
import gzip
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    part: str = ""  # which of many the specification holds, where the page steps through them


@dataclass(frozen=True)
class Notice:
    """What a section says instead of a figure that this run does not allow, with the commands that would."""

    text: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page: title, lead (plain text; the template escapes it), figures in order, and notices.

    A section with controls of its own names a `partial` of the templates, which gets `section` and `section.values`.
    `data` goes into the page's JSON, for its scripts; `numbers` into `--json` beside the figures' tables; `headline`,
    pairs of name and value, to the top of the page.
    """

    key: str
    title: str
    lead: str
    figures: tuple[Figure, ...] = ()
    notices: tuple[Notice, ...] = ()
    headline: tuple[tuple[str, str], ...] = ()
    partial: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


def label(text: str) -> str:
    """Return text that plotly shows literally: nothing invisible in it, and none of its markup."""
    return html.escape(readable(text), quote=False)


def grouped(number: int) -> str:
    """Return a number with its thousands set apart by thin spaces."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def shortened(text: str, length: int) -> str:
    """Return at most `length` characters of text, an ellipsis in place of what was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return names as a sentence has them, the last few as a number where they are many."""
    names = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def pack(data: bytes) -> str:
    """Return base64 of gzip of `data`, the same for the same data; the page's scripts unpack it."""
    return base64.b64encode(gzip.compress(data, compresslevel=9, mtime=0)).decode("ascii")


def line(
    name: str, x: Sequence[Any], y: NDArray[np.float64], colours: Colours, *, marker: str = "", dash: str = "solid",
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


def band(
    name: str, x: Sequence[Any], low: NDArray[np.float64], high: NDArray[np.float64], colours: Colours
) -> list[dict[str, Any]]:
    """Two invisible lines with the interval filled between them, that come and go with the line of the same name."""
    light, dark = (f"rgba({int(c[1:3], 16)},{int(c[3:5], 16)},{int(c[5:7], 16)},0.18)" for c in colours)
    edge = ("rgba(0,0,0,0)", "rgba(0,0,0,0)")
    upper = line(name, x, high, edge, width=0, group=name, silent=True)
    lower = line(name, x, low, edge, width=0, group=name, silent=True) | {"fill": "tonexty", "fillcolor": light}
    lower["meta"] = {"dark": {"fillcolor": dark}}
    return [upper, lower]


def dots(
    name: str, categories: Sequence[str], ends: Sequence[NDArray[np.float64]], colours: Colours, symbol: str, unit: str
) -> dict[str, Any]:
    """Dots from left to right, one per category, with their intervals as bars; `ends` are value, low and high."""
    value, low, high = ends
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(name),
        "x": rounded(value, 3),
        "y": [label(category) for category in categories],
        "marker": {"color": colours[0], "size": 9, "symbol": symbol},
        "error_x": error_bars(ends) | {"color": colours[0]},
        "customdata": rounded(np.stack([low, high], axis=-1), 3),
        "hovertemplate": f"%{{y}}<br>%{{x:.2f}} {unit}  [%{{customdata[0]:.2f}}, %{{customdata[1]:.2f}}]",
        "meta": {"dark": {"marker.color": colours[1], "error_x.color": colours[1]}},
    }


def error_bars(ends: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    value, low, high = ends
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded(high - value, 4),
        "arrayminus": rounded(value - low, 4),
        "thickness": 1.5,
        "width": 4,
    }


def dots_layout(x_title: str, categories: int) -> dict[str, Any]:
    layout = line_layout(x_title, "", height=110 + 30 * categories) | {"hovermode": "closest"}
    layout["xaxis"] |= {"showgrid": True}
    layout["yaxis"] |= {"automargin": True, "type": "category", "showgrid": False}
    return layout


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
