"""The report's figures as files for papers and slides: SVG, PNG or PDF, each readable standing alone.

kaleido draws them with plotly in a Chromium that this machine has (BROWSER_PATH names one elsewhere); nothing is loaded
from the network, so that no formula of MathJax can be set.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from types import ModuleType
from typing import Any

from analysis.figures import Figure, label
from groundwork.errors import ConfigurationError

FORMATS = ("svg", "png", "pdf")
SCALE = {"svg": 1, "png": 2, "pdf": 1}  # pixels per CSS pixel
NO_NETWORK = {"mathjax": False}
INK, SOFT, RULE = "#1d2126", "#565c64", "#dfe2e6"
FONT = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
TITLE_ROOM, TITLE_LINE, LEGEND_ROW = 46, 22, 24  # px above the plot
BOTTOM = 10  # px more below it than on the page
LEGEND_CHARACTERS = 105  # that fit beside each other in 1000 px of legend, its marks included


def check_images(folder: Path) -> None:
    """Draw an empty figure, so that what stands in the way is known before any work.

    Raises ConfigurationError where kaleido or a browser is missing, or `folder` is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--figures {folder}: is a file, wanted a folder; name another")
    _draw_nothing(f"--figures {folder}")


def check_image(output: Path) -> None:
    """Draw an empty figure, likewise; raises ConfigurationError where kaleido or a browser is missing."""
    _draw_nothing(f"--figure {output}")


def write_images(figures: Sequence[Figure], folder: Path, image_format: str, source: str) -> list[Path]:
    """Write each figure to `folder` as KEY.FORMAT, under its title and `source`, and return the files.

    Figures that the page's own scripts fill are left out.
    Raises ConfigurationError where kaleido or a browser is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = [
        figure for figure in figures if any(len(trace.get("z", trace.get("x", ()))) for trace in figure.spec["data"])
    ]
    names = [f"{figure.key}.{image_format}" for figure in figures]
    _draw(figures, [folder / name for name in names], image_format, source, f"--figures {folder}")
    return [folder / name for name in names]


def write_image(figure: Figure, output: Path, source: str) -> None:
    """Write one figure to `output`, in the format of FORMATS that its suffix names, under its title and `source`.

    Raises ConfigurationError where kaleido or a browser is missing.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _draw([figure], [output], output.suffix.removeprefix("."), source, f"--figure {output}")


def standing_alone(figure: Figure, source: str) -> dict[str, Any]:
    """Return a plotly figure in the light page's colours with title, and white ground."""
    data, layout = (copy.deepcopy(figure.spec[part]) for part in ("data", "layout"))
    width = max(figure.min_width, min(figure.max_width, 1000))
    named = [trace["name"] for trace in data if trace.get("name") and trace.get("showlegend", True)]
    legend = layout.get("showlegend", len(named) > 1)
    rows = -(-sum(len(name) + 8 for name in named) * 1000 // (LEGEND_CHARACTERS * width)) if legend else 0
    title = wrap(figure.title, width // 10)
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "tickfont": {"color": SOFT}}
    if "coloraxis" in layout:
        layout["coloraxis"]["colorbar"] = bar | layout["coloraxis"].get("colorbar", {})
    for trace in data:
        if trace["type"] == "heatmap" and "coloraxis" not in trace:
            trace["colorbar"] = bar | trace.get("colorbar", {})
    for name in [name for name in layout if name.startswith(("xaxis", "yaxis"))]:
        axis = {"gridcolor": RULE, "linecolor": RULE, "zerolinecolor": SOFT, "tickfont": {"color": SOFT}}
        words = {"standoff": 8, "font": {"size": 13, "color": SOFT}} | layout[name].get("title", {})
        layout[name] = axis | layout[name] | {"automargin": True, "title": words}
    margin = {"l": 60, "r": 24, "t": 0, "b": 50} | layout.get("margin", {})
    above = TITLE_ROOM + TITLE_LINE * len(title) + max(margin["t"], LEGEND_ROW * rows)
    layout |= {
        "width": width,
        "height": layout["height"] - margin["t"] + above + BOTTOM,
        "margin": margin | {"t": above, "r": max(margin["r"], 24), "b": margin["b"] + BOTTOM},
        "title": {
            "text": "<br>".join(map(label, title)),
            "subtitle": {
                "text": label(f"{source}: {figure.part}" if figure.part else source),
                "font": {"size": 12, "color": SOFT},
            },
            "font": {"size": 17},
            "x": 0.01,
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 14},
        },
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": FONT, "size": 13, "color": INK},
    }
    return {"data": data, "layout": layout}


def _draw_nothing(option: str) -> None:
    with _drawing(option) as kaleido:
        kaleido.calc_fig_sync({"data": [], "layout": {}}, {"format": "svg"}, kopts=dict(NO_NETWORK))


def _draw(figures: Sequence[Figure], outputs: Sequence[Path], image_format: str, source: str, option: str) -> None:
    """Draw each figure beside its output, and put it in place when all are drawn."""
    with _drawing(option) as kaleido, TemporaryDirectory(dir=outputs[0].parent if outputs else None) as unfinished:
        drawn = [Path(unfinished) / output.name for output in outputs]
        kaleido.write_fig_from_object_sync(
            [
                {
                    "fig": standing_alone(figure, source),
                    "path": path,
                    "opts": {"format": image_format, "scale": SCALE[image_format]},
                }
                for figure, path in zip(figures, drawn, strict=True)
            ],
            kopts=dict(NO_NETWORK),
        )
        for path, output in zip(drawn, outputs, strict=True):
            path.replace(output)


@contextmanager
def _drawing(option: str) -> Iterator[ModuleType]:
    """Give kaleido; raise ConfigurationError, which begins with the option, where it or its browser can not be had."""
    try:
        import kaleido
        from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
    except ImportError:
        raise ConfigurationError(
            f"{option}: needs kaleido, which is not installed; run pip install 'expert-speculation[figures]'"
        ) from None
    try:
        yield kaleido
    except (BrowserClosedError, BrowserFailedError, ChromeNotFoundError) as error:
        problem = "was not found" if isinstance(error, ChromeNotFoundError) else "closes as soon as it starts"
        named = f" (BROWSER_PATH={os.environ['BROWSER_PATH']})" if "BROWSER_PATH" in os.environ else ""
        raise ConfigurationError(
            f"{option}: needs Chromium or Chrome, which {problem}{named}; install it, such as by "
            "'apt-get install chromium', or name a working one in BROWSER_PATH"
        ) from None
