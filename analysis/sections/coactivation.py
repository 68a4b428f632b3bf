"""Section of co-activation: which experts of a layer are used together, by a token and within the next tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.coactivation import (
    WINDOW,
    CoactivationCounts,
    expected_window,
    expected_within,
    lift,
    window_bits,
    within_bits,
)
from analysis.figures import SERIES, Figure, Notice, Section, grouped, line, line_layout, rounded, ticks
from analysis.matrices import Matrices, lifts, octaves, shown_layers

MIN_EXPECTED = 50  # tokens; pairs that chance would bring together less often are not ranked
RANKED = 200  # pairs in the table
DRAWN = 16  # pairs in the figure


def make(counts: CoactivationCounts, top_k: int) -> Section:
    """Return the section; pairs within a token need K > 1, and E > 2 for a pair to be a choice."""
    within_LEE, window_LEE = counts.within_LEE, counts.window_LEE
    num_layers, num_experts = counts.num_layers, counts.num_experts
    paired = top_k > 1 and num_experts > 2
    shown = shown_layers(num_layers, num_experts)
    within_lift = lift(within_LEE, expected_within(within_LEE)) if paired else None
    window_lift = lift(window_LEE, expected_window(window_LEE))
    kinds = [
        Matrices(
            f"within the next {WINDOW} tokens",
            octaves(window_lift[shown]),
            [f"layer {layer}" for layer in shown],
            ["chosen for a token" for _ in shown],
            [f"chosen for one of the {WINDOW} tokens after it" for _ in shown],
        )
    ]
    if within_lift is not None:
        kinds.insert(
            0,
            Matrices(
                "by the same token",
                octaves(within_lift[shown]),
                [f"layer {layer}" for layer in shown],
                ["expert" for _ in shown],
                ["expert" for _ in shown],
            ),
        )
    stepped, data = lifts(
        "pairs",
        "Pairs of experts, layer by layer",
        _pairs_sentence(within_lift, window_lift),
        kinds,
        "experts %{y} and %{x}<br>%{customdata:.2f} times as often as expected<extra></extra>",
    )
    figures = [bits_figure(counts, paired), stepped]
    ranked: list[list[Any]] = []
    if within_lift is not None:
        ranked = strongest_pairs(within_LEE, within_lift)
        if ranked:
            figures.append(pair_figure(ranked))
    notices = (
        () if paired else (Notice("Tokens use one expert per layer here, so none are used together by one token."),)
    )
    return Section(
        key="coactivation",
        title="Experts used together",
        lead=(
            "Experts that are used together can be fetched together, and should not lie on the same device. The "
            "yardstick is independence: the same experts, used as often as here, but chosen without regard to each "
            "other."
        ),
        figures=tuple(figures),
        notices=notices,
        partial="coactivation.html.j2",
        data={"pair": data},
        numbers={
            "coactivation": {
                "layers": shown,
                "window": WINDOW,
                "within_lift": None if within_lift is None else rounded(within_lift[shown], 4),
                "window_lift": rounded(window_lift[shown], 4),
            }
        },
    )


def _pairs_sentence(within_lift: NDArray[np.float64] | None, window_lift: NDArray[np.float64]) -> str:
    def far(lift_LEE: NDArray[np.float64]) -> float:
        known = lift_LEE[np.isfinite(lift_LEE)]
        return float(100 * ((known > 2) | (known < 0.5)).mean()) if known.size else 0.0

    sentence = (
        "Orange pairs are used together more often than independent choices of the same experts would be, blue ones "
        "less often, colourless ones as expected: more than twice or less than half as often are "
    )
    if within_lift is None:
        return sentence + f"{far(window_lift):.0f} % of the pairs, over all layers."
    return (
        sentence + f"{far(within_lift):.0f} % of the pairs within a token and {far(window_lift):.0f} % of those in a "
        "window, over all layers. A token's experts all differ, so that no expert pairs with itself."
    )


def bits_figure(counts: CoactivationCounts, paired: bool) -> Figure:
    """How far pairs are from independence, in bits, by layer."""
    layers = list(range(counts.num_layers))
    after_L = window_bits(counts.window_LEE)
    data = [line(f"one of the {WINDOW} tokens after", layers, after_L, SERIES[1], marker="square")]
    within_L = within_bits(counts.within_LEE) if paired else np.full(counts.num_layers, np.nan)
    if paired:
        data.insert(0, line("same token", layers, within_L, SERIES[0], marker="circle"))
    for trace in data:
        trace["hovertemplate"] = "%{y:.4f} bits"
    layout = line_layout("layer", "bits", height=300)
    layout["yaxis"]["rangemode"] = "tozero"
    layout["xaxis"] |= ticks(counts.num_layers, 16)
    sentence = "0 bits mean that experts are chosen independently of each other: "
    if paired:
        sentence += (
            f"the other experts of a token stray from that by {within_L.mean():.3f} bits per pair on average, most in "
            f"layer {int(within_L.argmax())}, and "
        )
    sentence += f"those of the next {WINDOW} tokens by {after_L.mean():.3f}, most in layer {int(after_L.argmax())}."
    return Figure(
        key="coactivation_bits",
        title="How far pairs of experts are from independence",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["layer", "same token, bits", f"next {WINDOW} tokens, bits"],
        rows=[[layer, *rounded(np.array([within_L[layer], after_L[layer]]), 5)] for layer in layers],
    )


def strongest_pairs(within_LEE: NDArray[np.int64], lift_LEE: NDArray[np.float64]) -> list[list[Any]]:
    """Return rows (layer, expert, expert, lift, tokens, tokens expected) of the pairs with the highest lift."""
    expected_LEE = np.divide(within_LEE, lift_LEE, out=np.zeros(lift_LEE.shape), where=lift_LEE > 0)
    upper = np.triu(np.ones(within_LEE.shape[1:], dtype=bool), 1)
    layer_P, a_P, b_P = np.nonzero((expected_LEE >= MIN_EXPECTED) & upper)
    order = np.argsort(-lift_LEE[layer_P, a_P, b_P], kind="stable")[:RANKED]
    return [
        [
            int(layer), int(a), int(b), round(float(lift_LEE[layer, a, b]), 3), int(within_LEE[layer, a, b]),
            round(float(expected_LEE[layer, a, b]), 1),
        ]
        for layer, a, b in zip(layer_P[order], a_P[order], b_P[order], strict=True)
    ]  # fmt: skip


def pair_figure(ranked: list[list[Any]]) -> Figure:
    """Bars of the pairs with the highest lift."""
    drawn = ranked[:DRAWN]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [row[3] for row in drawn],
        "y": [f"layer {row[0]}: {row[1]} and {row[2]}" for row in drawn],
        "customdata": [row[4:] for row in drawn],
        "hovertemplate": "%{y}<br>%{x:.2f} times as often as expected: %{customdata[0]} tokens for %{customdata[1]:.0f}"
        "<extra></extra>",
        "marker": {"color": SERIES[0][0]},
        "meta": {"dark": {"marker.color": SERIES[0][1]}},
    }
    layout = line_layout("times as often as expected", "", height=90 + 24 * len(drawn))
    layout |= {"hovermode": "closest", "bargap": 0.35}
    layout["xaxis"] |= {"showgrid": True, "rangemode": "tozero"}
    layout["yaxis"] |= {"autorange": "reversed", "automargin": True, "type": "category", "showgrid": False}
    layout["margin"]["t"] = 8
    layer, a, b, times, tokens, expected = drawn[0]
    return Figure(
        key="strongest_pairs",
        title="Pairs that tokens use together most, against independence",
        sentence=(
            f"Experts {a} and {b} of layer {layer} serve the same token {times:.1f} times as often as independent "
            f"choices would: {grouped(tokens)} tokens, where {grouped(round(expected))} are expected. Pairs expected "
            f"in fewer than {MIN_EXPECTED} tokens are left out; the table lists the first {len(ranked)}."
        ),
        spec={"data": [trace], "layout": layout},
        columns=["layer", "expert", "expert", "times as often as expected", "tokens", "expected tokens"],
        rows=ranked,
        max_width=820,
    )
