"""Figures of what the routers chose: usage by layer and data set, data-set information, and transitions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import (
    DIVERGING,
    SERIES,
    Figure,
    category_axis,
    heatmap,
    heatmap_layout,
    label,
    line,
    line_layout,
    rounded,
    ticks,
)
from analysis.tokens import readable
from analysis.transitions import TransitionCounts, conditional, transition_bits
from analysis.usage import MutualInformation, UsageCounts

SMALL_MULTIPLES = 12  # data sets drawn side by side; the table holds all of them
ROW_GAP = 60  # px between rows of small multiples, for ticks and the next title
MAX_OCTAVES = 3  # usage colours reach from 1/8 to 8 times uniform at most


def make(usage: UsageCounts, transitions: TransitionCounts) -> list[Figure]:
    """Return all figures that these counts allow; those that compare data sets need two of them."""
    figures = [usage_figure(usage.share_LE())]
    information = usage.mutual_information()
    if information is not None:
        figures.append(dataset_figure(usage.difference_DLE(), usage.datasets, usage.tokens_D))
        figures.append(mutual_information_figure(information))
    figures.append(transition_information_figure(transitions.across_layers_LEE, transitions.across_tokens_LEE))
    figures.append(transition_heatmap(transitions.num_experts))
    return figures


def usage_figure(share_LE: NDArray[np.float64]) -> Figure:
    """Heatmap of each expert's share of its layer's selections, coloured by its ratio to the uniform share."""
    num_layers, num_experts = share_LE.shape
    uniform = 1 / num_experts
    octaves_LE = np.log2(np.maximum(share_LE / uniform, 2.0**-MAX_OCTAVES))
    reach = int(np.clip(np.ceil(np.quantile(np.abs(octaves_LE), 0.98)), 1, MAX_OCTAVES))
    octaves_LE = octaves_LE.clip(-reach, reach)
    steps = range(-reach, reach + 1)
    trace = heatmap(octaves_LE, "diverging", zmin=-reach, zmax=reach) | {
        "customdata": rounded(100 * share_LE, 2),
        "hovertemplate": "layer %{y}, expert %{x}<br>%{customdata:.2f} % of selections<extra></extra>",
    }
    if num_experts <= 16:
        trace |= {"text": rounded(100 * share_LE, 1), "texttemplate": "%{text}"}
    trace["colorbar"] = {
        "tickvals": list(steps),
        "ticktext": [f"{100 * uniform * 2.0**step:.3g} %" + (" uniform" if step == 0 else "") for step in steps],
    }
    unused = int((share_LE == 0).sum())
    busiest = np.unravel_index(int(share_LE.argmax()), share_LE.shape)
    sentence = (
        f"Colourless cells are used as often as uniform choice would use them ({100 * uniform:.3g} %), orange ones "
        f"more, blue ones less; the busiest is expert {busiest[1]} of layer {busiest[0]} with "
        f"{100 * share_LE.max():.1f} % of its layer's selections, and "
        f"{unused if unused else 'not one'} of the {share_LE.size} is never chosen."
    )
    return Figure(
        key="usage",
        title="Share of selections, layers by experts",
        sentence=sentence,
        spec={"data": [trace], "layout": heatmap_layout(num_layers, num_experts)},
        columns=["layer", *(f"expert {expert}, %" for expert in range(num_experts))],
        rows=[[layer, *rounded(100 * row, 2)] for layer, row in enumerate(share_LE)],
        max_width=min(1080, 260 + 58 * num_experts),
    )


def dataset_figure(difference_DLE: NDArray[np.float64], datasets: Sequence[str], tokens_D: NDArray[np.int64]) -> Figure:
    """Small multiples, one per data set: its usage less the mean over data sets, in percentage points."""
    num_datasets, num_layers, num_experts = difference_DLE.shape
    points_DLE = 100 * difference_DLE
    shown = sorted(np.argsort(-tokens_D, kind="stable")[:SMALL_MULTIPLES].tolist())
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    limit = float(np.quantile(np.abs(points_DLE), 0.995)) or 1.0
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
    for place, dataset in enumerate(shown):
        row, column = divmod(place, columns)
        suffix = "" if place == 0 else str(place + 1)
        left = column * (width + gap_x)
        top = 1 - row * (share_y + gap_y)
        data.append(
            {
                "type": "heatmap",
                "z": rounded(points_DLE[dataset], 3),
                "coloraxis": "coloraxis",
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "hovertemplate": f"{label(datasets[dataset])}<br>layer %{{y}}, expert %{{x}}"
                "<br>%{z:+.2f} points<extra></extra>",
            }
        )
        bottom_row = place + columns >= len(shown)
        layout[f"xaxis{suffix}"] = category_axis(num_experts, 6) | {
            "domain": [left, left + width],
            "anchor": f"y{suffix}",
            "title": {"text": "expert" if bottom_row else ""},
        }
        layout[f"yaxis{suffix}"] = category_axis(num_layers, 5) | {
            "domain": [max(0.0, top - share_y), top],
            "anchor": f"x{suffix}",
            "autorange": "reversed",
            "showticklabels": column == 0,
            "title": {"text": "layer" if column == 0 else ""},
        }
        layout["annotations"].append(
            {
                "text": f"<b>{label(_shortened(datasets[dataset], 30))}</b>",
                "x": left,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "borderpad": 0,
                "yshift": 3,
            }
        )
    strongest = tuple(int(i) for i in np.unravel_index(int(np.abs(points_DLE).argmax()), points_DLE.shape))
    more = points_DLE[strongest] > 0
    sentence = (
        f"Orange marks experts that a data set uses more than the mean over data sets, blue less; most of all, "
        f"{readable(datasets[strongest[0]])} uses expert {strongest[2]} of layer {strongest[1]} "
        f"{'more' if more else 'less'}, by {abs(points_DLE[strongest]):.1f} points."
    )
    if len(shown) < num_datasets:
        sentence += f" The {len(shown)} data sets with most tokens are drawn; the table holds all {num_datasets}."
    return Figure(
        key="datasets",
        title="Difference to the mean over data sets",
        min_width=170 * columns,
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["data set", "layer", *(f"expert {expert}, pt" for expert in range(num_experts))],
        rows=[
            [readable(datasets[d]), layer, *rounded(points_DLE[d, layer], 2)]
            for d in range(num_datasets)
            for layer in range(num_layers)
        ],
    )


def mutual_information_figure(information: MutualInformation) -> Figure:
    """Line of data-set information per layer over the band of shuffled labels."""
    layers = list(range(len(information.bits_L)))
    band_colours = ("rgba(110,116,124,0.22)", "rgba(170,176,184,0.22)")
    data = [
        line("97.5 % of shuffles", layers, information.shuffled_high_L, ("#0000", "#0000"), width=0, silent=True),
        line("shuffled labels, 95 %", layers, information.shuffled_low_L, ("#0000", "#0000"), width=0)
        | {"fill": "tonexty", "fillcolor": band_colours[0], "hoverinfo": "skip"},
        line("shuffled labels, mean", layers, information.shuffled_mean_L, ("#7b828b", "#959ba3"), dash="dot"),
        line("observed", layers, information.bits_L, SERIES[0], marker="circle", width=2.5),
    ]
    data[1]["meta"] = {"dark": {"fillcolor": band_colours[1]}}
    for trace in data[2:]:
        trace["hovertemplate"] = "%{y:.4f} bits"
    clear = int((information.bits_L > information.shuffled_high_L).sum())
    peak = int(information.bits_L.argmax())
    sentence = (
        f"Where the line stands above the grey band, an expert choice says which data set the text is from beyond what "
        f"shuffled labels give: so in {clear} of {len(layers)} layers, most in layer {peak} with "
        f"{information.bits_L[peak]:.3f} bits (p = {information.p_value_L[peak]:.3g}, {information.permutations} "
        f"permutations over sequences)."
    )
    layout = line_layout("layer", "bits", height=320) | {"yaxis": {"title": {"text": "bits"}, "rangemode": "tozero"}}
    layout["xaxis"] |= ticks(len(layers), 16)
    return Figure(
        key="information",
        title="Mutual information between data set and expert",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["layer", "observed, bits", "shuffled mean", "shuffled 2.5 %", "shuffled 97.5 %", "p"],
        rows=[
            [layer, *(rounded(np.array(values), 5))]
            for layer, values in enumerate(
                zip(
                    information.bits_L,
                    information.shuffled_mean_L,
                    information.shuffled_low_L,
                    information.shuffled_high_L,
                    information.p_value_L,
                    strict=True,
                )
            )
        ],
    )


def transition_information_figure(layers_LEE: NDArray[np.int64], tokens_LEE: NDArray[np.int64]) -> Figure:
    """Bits that one selection tells about the next, along the layers and along the tokens."""
    layer_bits, token_bits = transition_bits(layers_LEE), transition_bits(tokens_LEE)
    num_layers, num_experts = tokens_LEE.shape[0], tokens_LEE.shape[1]
    data = [
        line("layer below, same token", list(range(1, num_layers)), layer_bits, SERIES[0], marker="circle"),
        line("previous token, same layer", list(range(num_layers)), token_bits, SERIES[1], marker="square"),
    ]
    for trace in data:
        trace["hovertemplate"] = "%{y:.3f} bits"
    means = [float(bits.mean()) if len(bits) else 0.0 for bits in (layer_bits, token_bits)]
    sentence = (
        f"The higher a point, the more one past selection tells about a selection at that layer: on average "
        f"{means[0]:.2f} bits from the layer below and {means[1]:.2f} bits from the previous token, of at most "
        f"{np.log2(num_experts):.2f}."
    )
    layout = line_layout("layer that is predicted", "bits", height=300)
    layout["yaxis"]["rangemode"] = "tozero"
    layout["xaxis"] |= ticks(num_layers, 16)
    return Figure(
        key="predictability",
        title="What a past selection tells",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["layer", "from the layer below, bits", "from the previous token, bits"],
        rows=[
            [layer, round(float(layer_bits[layer - 1]), 4) if layer else None, round(float(token_bits[layer]), 4)]
            for layer in range(num_layers)
        ],
    )


def transition_heatmap(num_experts: int) -> Figure:
    """The empty heatmap that the page fills with the conditional probabilities of the chosen pair of layers."""
    trace = heatmap(np.zeros((0, 0)), "sequential", zmin=0, zmax=100) | {
        "hovertemplate": "after expert %{y}: expert %{x}<br>%{z:.1f} % of selections<extra></extra>",
        "colorbar": {"title": {"text": "", "side": "right"}, "ticksuffix": " %"},
    }
    if num_experts <= 16:
        trace["texttemplate"] = "%{z:.0f}"
    layout = heatmap_layout(num_experts, num_experts)
    layout["height"] = int(np.clip(num_experts * 30, 300, 620)) + 70
    return Figure(
        key="transitions",
        title="Which expert follows which",
        sentence=(
            "Each row is an expert that was chosen, and its cells say how the next selections spread over the experts "
            "(rows sum to 100 %): the further a row is from even, the more a predictor can use."
        ),
        spec={"data": [trace], "layout": layout},
        columns=[],
        rows=[],
        max_width=int(np.clip(200 + 58 * num_experts, 520, 820)),
    )


def conditional_for_page(counts_LEE: NDArray[np.int64], shown: Sequence[int]) -> bytes:
    """Return P(next | this) of the shown layers, little-endian uint16 in units of 1/65534; 65535 where never seen."""
    probability = conditional(counts_LEE[list(shown)])
    return np.where(np.isnan(probability), 65535, np.rint(65534 * np.nan_to_num(probability))).astype("<u2").tobytes()


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
