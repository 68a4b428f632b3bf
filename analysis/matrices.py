"""Expert-by-expert matrices that the page steps through, layer by layer: packed for its script, the first one drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import Figure, heatmap, heatmap_layout, pack, rounded

MAX_VALUES = 500_000  # of all matrices of one figure; layers are thinned out evenly beyond
NEVER = 65535  # packed value of a cell without a number
LIFT_UNIT = 1 / 16  # octaves
PERCENT_UNIT = 0.01  # as the table shows them
MAX_OCTAVES = 4


@dataclass(frozen=True, eq=False)
class Matrices:
    """One choice of the select box: matrices [N, E, E] with the words that stand around each of them."""

    label: str
    values_NEE: NDArray[np.float64]  # per cent, or octaves; NaN where there is nothing to say
    names: list[str]  # such as "layer 3"
    row_titles: list[str]
    column_titles: list[str]


def percentages(key: str, title: str, sentence: str, kinds: Sequence[Matrices], hover: str) -> tuple[Figure, Any]:
    """Return the figure of matrices in per cent, and the data of the script that steps through them."""
    return _stepped(key, title, sentence, kinds, hover, low=0.0, unit=PERCENT_UNIT, lifts=False)


def lifts(key: str, title: str, sentence: str, kinds: Sequence[Matrices], hover: str) -> tuple[Figure, Any]:
    """Return the figure of matrices of lifts as octaves (log2), and the data of the script that steps through them."""
    return _stepped(key, title, sentence, kinds, hover, low=-MAX_OCTAVES, unit=LIFT_UNIT, lifts=True)


def shown_layers(num_layers: int, num_experts: int, kinds: int = 2) -> list[int]:
    """Return the layers whose matrices the file carries: all, or as many evenly spaced ones as fit."""
    most = max(1, MAX_VALUES // (kinds * num_experts**2))
    if num_layers <= most:
        return list(range(num_layers))
    return sorted({round(float(layer)) for layer in np.linspace(0, num_layers - 1, most)})


def octaves(lift_NEE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log2 of lifts cut at MAX_OCTAVES either way; NaN stays NaN."""
    return np.log2(np.maximum(lift_NEE, 2.0**-MAX_OCTAVES)).clip(-MAX_OCTAVES, MAX_OCTAVES)


def _stepped(
    key: str, title: str, sentence: str, kinds: Sequence[Matrices], hover: str, *, low: float, unit: float, lifts: bool
) -> tuple[Figure, dict[str, Any]]:
    num_experts = kinds[0].values_NEE.shape[-1]
    first = next((kind for kind in kinds if len(kind.values_NEE)), None)
    values = first.values_NEE[0] if first else np.full((num_experts, num_experts), np.nan)
    trace = heatmap(values, "diverging" if lifts else "sequential") | {"hovertemplate": hover}
    reach = max(1.0, float(np.nanmax(np.abs(values), initial=0.0)))
    if lifts:
        steps = range(-MAX_OCTAVES, MAX_OCTAVES + 1)
        trace |= {
            "zmin": -reach,
            "zmax": reach,
            "customdata": rounded(2.0**values, 2),
            "colorbar": {"tickvals": list(steps), "ticktext": [_times(step) for step in steps]},
        }
    else:
        trace |= {"zmin": 0, "zmax": reach, "colorbar": {"ticksuffix": " %"}}
    if num_experts <= 16:
        shown = 2.0**values if lifts else values
        trace["text"] = [["" if np.isnan(each) else f"{each:.{1 if lifts else 0}f}" for each in row] for row in shown]
        trace["texttemplate"] = "%{text}"
    layout = heatmap_layout(num_experts, num_experts)
    layout["height"] = int(np.clip(num_experts * 30, 300, 620)) + 70
    layout["margin"] |= {"l": 64}
    if first:
        layout["yaxis"]["title"]["text"] = first.row_titles[0]
        layout["xaxis"]["title"]["text"] = first.column_titles[0]
    figure = Figure(
        key=key,
        title=title,
        sentence=sentence,
        spec={"data": [trace], "layout": layout},
        columns=["expert", *(str(expert) for expert in range(num_experts))],
        rows=[
            [expert, *rounded(2.0**row if lifts else row, 2)] for expert, row in enumerate(values)
        ],  # the page's script puts those of the matrix on view in their place
        max_width=int(np.clip(200 + 58 * num_experts, 520, 820)),
        part=f"{first.label}, {first.names[0]}" if first else "",
    )
    data = {
        "figure": key,
        "num_experts": num_experts,
        "low": low,
        "unit": unit,
        "lifts": lifts,
        "kinds": [
            {
                "label": kind.label,
                "names": kind.names,
                "row_titles": kind.row_titles,
                "column_titles": kind.column_titles,
            }
            for kind in kinds
        ],
        "packed": pack(b"".join(_encoded(kind.values_NEE, low, unit) for kind in kinds)),
    }
    return figure, data


def _encoded(values: NDArray[np.float64], low: float, unit: float) -> bytes:
    """Return little-endian uint16, the value being `low + unit * n`; NEVER where it is NaN."""
    steps = np.rint((np.nan_to_num(values, nan=low) - low) / unit)
    return np.where(np.isnan(values), NEVER, steps).astype("<u2").tobytes()


def _times(octave: int) -> str:
    return "as expected" if octave == 0 else f"{2**octave} ×" if octave > 0 else f"1/{2**-octave} ×"
