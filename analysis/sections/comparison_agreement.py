"""Figures of two runs on the same texts: which experts and weights they agree on, by layer and by data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import (
    SERIES,
    Figure,
    band,
    dots,
    dots_layout,
    line,
    line_layout,
    listed,
    rounded,
    shortened,
    ticks,
)
from analysis.tokens import readable

MEASURES = {  # of `Agreement`: name in legends and tables
    "shared": "experts shared",
    "exact_set": "same set",
    "first_choice": "same first choice",
}
MARKERS = ("circle", "square", "diamond")
GREY = ("#7b828b", "#959ba3")
SHOWN_DATASETS = 24  # with most tokens; the table holds all of them


def agreement_figure(agreement: Mapping[str, Any], expected_L: NDArray[np.float64], top_k: tuple[int, int]) -> Figure:
    """Agreement per layer, one line per measure with its interval as a band, over what chance would give."""
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    layers = [entry["layer"] for entry in agreement["by_layer"]]
    present = [measure for measure in MEASURES if measure in agreement]
    for place, measure in enumerate(present):
        values, low, high = _ends([entry[measure] for entry in agreement["by_layer"]])
        data += band(MEASURES[measure], layers, low, high, SERIES[place])
        data.append(
            line(MEASURES[measure], layers, values, SERIES[place], marker=MARKERS[place], group=MEASURES[measure])
            | {
                "customdata": rounded(np.stack([low, high], axis=-1), 3),
                "hovertemplate": "%{y:.2f} %  [%{customdata[0]:.2f}, %{customdata[1]:.2f}]",
            }
        )
        rows += [[MEASURES[measure], layer, *_percents(agreement["by_layer"][layer][measure])] for layer in layers]
    chance = line("experts shared, if chosen apart", layers, 100 * expected_L, GREY, dash="dot")
    data.append(chance | {"hovertemplate": "%{y:.2f} %"})
    rows += [["experts shared, if chosen apart", layer, round(100 * float(expected_L[layer]), 2), None, None]
             for layer in layers]  # fmt: skip
    shared_L = np.array([entry["shared"]["value"] for entry in agreement["by_layer"]])
    most, least = int(shared_L.argmax()), int(shared_L.argmin())
    fewest = min(top_k)
    sentence = (
        f"Of the {fewest} experts of a token{'' if len(set(top_k)) == 1 else ' (the smaller set)'}, "
        f"{100 * agreement['shared']['value']:.1f} % are chosen by both runs on the mean over layers, "
        + (
            f"from {100 * shared_L[least]:.1f} % in layer {least} to {100 * shared_L[most]:.1f} % in layer {most}"
            if shared_L[least] < shared_L[most]
            else "in every layer alike"
        )
        + "; two runs that chose apart from each other, each expert as often as here, would share "
        f"{100 * expected_L.mean():.1f} %."
    )
    layout = line_layout("layer", "", height=380)
    layout["yaxis"] |= {"ticksuffix": " %", "title": {"text": "share of tokens or experts"}}
    layout["xaxis"] |= ticks(len(layers), 16)
    return Figure(
        key="comparison_agreement",
        title="Agreement on the same texts, by layer",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["measure", "layer", "agreement, %", "95 % from", "to"],
        rows=rows,
    )


def dataset_figure(agreement: Mapping[str, Any]) -> Figure:
    """Dots with intervals: agreement by data set, mean over layers."""
    by_dataset = agreement["by_dataset"]
    drawn = sorted(by_dataset, key=lambda name: -by_dataset[name]["tokens"])[:SHOWN_DATASETS]
    drawn.sort(key=lambda name: by_dataset[name]["shared"]["value"])
    data = [
        dots(
            MEASURES[measure],
            [shortened(name, 30) for name in drawn],
            _ends([by_dataset[name][measure] for name in drawn]),
            SERIES[place],
            MARKERS[place],
            "%",
        )
        for place, measure in enumerate(measure for measure in MEASURES if measure in agreement)
    ]
    layout = dots_layout("mean over layers", len(drawn))
    layout["xaxis"]["ticksuffix"] = " %"
    least, most = (100 * by_dataset[name]["shared"]["value"] for name in (drawn[0], drawn[-1]))
    sentence = "Each dot is a data set's agreement, each bar its 95 % interval over sequences: the runs "
    if least < most:
        sentence += (
            f"agree least on {readable(drawn[0])} ({least:.1f} % of the experts shared) and most on "
            f"{readable(drawn[-1])} ({most:.1f} %)."
        )
    else:
        sentence += f"share {most:.1f} % of the experts on {'each of them' if len(drawn) > 1 else readable(drawn[0])}."
    if single := [readable(name) for name in drawn if by_dataset[name]["sequences"] == 1]:
        sentence += f" A single sequence has no interval ({listed(single)})."
    if len(drawn) < len(by_dataset):
        sentence += f" The {len(drawn)} data sets with most tokens are drawn; the table holds all {len(by_dataset)}."
    return Figure(
        key="comparison_datasets",
        title="Agreement on the same texts, by data set",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["data set", "sequences", "tokens", "measure", "agreement, %", "95 % from", "to"],
        rows=[
            [readable(name), part["sequences"], part["tokens"], MEASURES[measure], *_percents(part[measure])]
            for name, part in by_dataset.items()
            for measure in MEASURES
            if measure in part
        ],
        max_width=820,
    )


def weight_figure(agreement: Mapping[str, Any]) -> Figure:
    """Distance of the weights per layer, with its interval as a band."""
    layers = [entry["layer"] for entry in agreement["by_layer"]]
    values, low, high = (ends / 100 for ends in _ends([entry["weight_distance"] for entry in agreement["by_layer"]]))
    name = "distance of the weights"
    trace = line(name, layers, values, SERIES[0], marker="circle", group=name) | {
        "customdata": rounded(np.stack([low, high], axis=-1), 5),
        "hovertemplate": "%{y:.4f}  [%{customdata[0]:.4f}, %{customdata[1]:.4f}]",
    }
    layout = line_layout("layer", "distance of the weights", height=300) | {"showlegend": False}
    layout["yaxis"]["rangemode"] = "tozero"
    layout["xaxis"] |= ticks(len(layers), 16)
    mean = agreement["weight_distance"]["value"]
    return Figure(
        key="comparison_weights",
        title="Distance of the routing weights on the same texts",
        sentence=(
            "Half the sum of the absolute differences of a token's weights, each run's scaled to sum 1: 0 where both "
            "mix the same experts alike, 1 where they share none; "
            + (
                f"on the mean over layers {mean:.4f}, most in layer {int(values.argmax())} with {values.max():.4f}."
                if values.any()
                else "here no weight differs."
            )
        ),
        spec={"data": [*band(name, layers, low, high, SERIES[0]), trace], "layout": layout},
        columns=["layer", "distance", "95 % from", "to"],
        rows=[[layer, *rounded(np.array([values[layer], low[layer], high[layer]]), 5)] for layer in layers],
    )


def _ends(metrics: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.float64], ...]:
    """Return values, lower and upper ends in per cent."""
    return tuple(np.array([100 * metric[end] for metric in metrics]) for end in ("value", "low", "high"))


def _percents(metric: Mapping[str, float]) -> list[float]:
    return [round(100 * metric[end], 2) for end in ("value", "low", "high")]
