"""Section of transitions: what a choice tells about the choices to come, up the layers and along the text."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.layer_information import LayerInformation
from analysis.counts.transitions import TransitionCounts, conditional, transition_bits
from analysis.figures import SERIES, Figure, Section, category_axis, heatmap, line, line_layout, rounded, ticks
from analysis.matrices import Matrices, percentages, shown_layers


def make(transitions: TransitionCounts, information: LayerInformation | None, top_k: int) -> Section:
    """Return the section; `information` is None for a model of one layer."""
    num_layers, num_experts = transitions.num_layers, transitions.num_experts
    layers_LEE, tokens_LEE = transitions.across_layers_LEE, transitions.across_tokens_LEE
    tokens_shown = shown_layers(num_layers, num_experts)
    layers_shown = [layer for layer in tokens_shown if layer + 1 < num_layers]
    kinds = [
        Matrices(
            "a layer to the next, same token",
            100 * conditional(layers_LEE[layers_shown]),
            [f"layer {layer} → {layer + 1}" for layer in layers_shown],
            [f"chosen at layer {layer}" for layer in layers_shown],
            [f"share of selections at layer {layer + 1}, by expert" for layer in layers_shown],
        ),
        Matrices(
            "a token to the next, same layer",
            100 * conditional(tokens_LEE[tokens_shown]),
            [f"layer {layer}" for layer in tokens_shown],
            ["chosen for the previous token" for _ in tokens_shown],
            ["share of selections for the token, by expert" for _ in tokens_shown],
        ),
    ]
    stepped, data = percentages(
        "transitions",
        "Which expert follows which",
        "Each row is an expert that was chosen, and its cells say how the next selections spread over the experts "
        f"(rows sum to 100 %; {100 / num_experts:.3g} % is even): the further a row is from even, the more a predictor "
        f"can use.{_surest_step(layers_LEE, top_k)}",
        kinds if num_layers > 1 else kinds[1:],
        "after expert %{y}: expert %{x}<br>%{z:.1f} % of selections<extra></extra>",
    )
    figures = [transition_information_figure(layers_LEE, tokens_LEE), stepped]
    if information is not None:
        figures.append(layer_information_figure(information))
    return Section(
        key="transitions",
        title="Transitions",
        lead=(
            "What makes speculation possible: a choice made is evidence on the choices to come, up the layers and "
            "along the text."
        ),
        figures=tuple(figures),
        partial="transitions.html.j2",
        data={"transition": data},
        numbers={
            "transitions": {
                "layers": _probabilities(layers_LEE, layers_shown),
                "tokens": _probabilities(tokens_LEE, tokens_shown),
            }
        },
    )


def _surest_step(layers_LEE: NDArray[np.int64], top_k: int) -> str:
    """Say which expert follows which most surely, among experts that are chosen at least half as often as evenly."""
    total_LE = layers_LEE.sum(axis=-1)
    often = total_LE >= 0.5 * total_LE.mean(axis=-1, keepdims=True)
    probability = np.where(often[..., None], np.nan_to_num(conditional(layers_LEE)), 0.0)
    if not probability.any():
        return ""
    layer, before, after = (int(i) for i in np.unravel_index(int(probability.argmax()), probability.shape))
    return (
        f" The surest step is from expert {before} of layer {layer} to expert {after} of layer {layer + 1}, with "
        f"{100 * probability.max():.0f} % of the selections"
        + (f", of the {100 / top_k:.3g} % that one of {top_k} can have." if top_k > 1 else ".")
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


def layer_information_figure(information: LayerInformation) -> Figure:
    """Heatmap of the bits that a selection at one layer tells about one at another."""
    bits_LL = information.bits_LL
    num_layers = len(bits_LL)
    lower, higher = np.nonzero(np.isfinite(bits_LL))
    by_distance = [float(np.nanmean(np.diagonal(bits_LL, d))) for d in range(1, information.distance + 1)]
    trace = heatmap(bits_LL, "sequential", zmin=0, zmax=float(np.nanmax(bits_LL)) or 1.0) | {
        "hovertemplate": "layers %{y} and %{x}<br>%{z:.3f} bits<extra></extra>",
        "colorbar": {"ticksuffix": " bits"},
    }
    far, control = information.distance, float(np.nanmean(information.control_LL))
    reached = f"layers up to {far} apart" if far < num_layers - 1 else "all pairs of layers"
    sentence = (
        "The stronger a cell's colour, the more a selection at the lower layer (row) tells about one at the higher "
        f"layer (column), for {reached}: {by_distance[0]:.2f} bits on average one layer ahead"
        + (f", {by_distance[-1]:.2f} bits {far} layers ahead" if far > 1 else "")
        + ". A selection is any one of a token's experts; what tokens of two different texts share by chance, "
        f"{'less than 0.001' if control < 0.001 else f'{control:.3f}'} bits, is subtracted."
    )
    most = min(num_layers, 24)
    return Figure(
        key="layer_information",
        title="Mutual information between layers",
        sentence=sentence,
        spec={
            "data": [trace],
            "layout": {
                "height": int(np.clip(22 * num_layers, 260, 620)) + 60,
                "margin": {"l": 52, "r": 10, "t": 8, "b": 46},
                "xaxis": category_axis(num_layers, most) | {"title": {"text": "higher layer"}},
                "yaxis": category_axis(num_layers, most) | {"title": {"text": "lower layer"}, "autorange": "reversed"},
            },
        },
        columns=["lower layer", "higher layer", "bits", "before subtraction", "between different texts"],
        rows=[
            [
                int(a),
                int(b),
                *rounded(
                    np.array([each[a, b] for each in (bits_LL, information.observed_LL, information.control_LL)]), 5
                ),
            ]
            for a, b in zip(lower, higher, strict=True)
        ],
        max_width=int(np.clip(220 + 34 * num_layers, 420, 760)),
    )


def _probabilities(counts_LEE: NDArray[np.int64], layers: list[int]) -> list[dict[str, Any]]:
    """Return P(next | this) of the given layers as nested lists, None in the rows of experts never selected."""
    probability = rounded(conditional(counts_LEE[layers]), 5)
    return [{"layer": layer, "probability": rows} for layer, rows in zip(layers, probability, strict=True)]
