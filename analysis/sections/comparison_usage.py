"""Figures of how two runs use their experts: divergence, experts gained and lost, effective number of experts."""

from typing import Any

import numpy as np

from analysis.counts.comparison import Comparison
from analysis.counts.divergence import Divergence
from analysis.figures import SERIES, Figure, heatmap, heatmap_layout, line, line_layout, rounded, ticks

STYLES = (("circle", "solid"), ("square", "dash"))  # marker and dash of the first and the second line
GREY = ("#7b828b", "#959ba3")
GREY_BAND = ("rgba(110,116,124,0.22)", "rgba(170,176,184,0.22)")
FALSE_DISCOVERIES = 0.05


def divergence_figure(comparison: Comparison) -> Figure:
    """Jensen-Shannon divergence of usage per layer over the band that exchanged labels give."""
    main, whole = _main(comparison), comparison.divergence
    layers = list(range(len(main.bits_L)))
    of_pairs = comparison.divergence_of_pairs is not None
    texts = {"same texts": main} if of_pairs else {}
    if whole is not None and not (of_pairs and comparison.all_matched):
        texts["all texts"] = whole
    data = [
        line("97.5 % of exchanges", layers, main.exchanged_high_L, ("#0000", "#0000"), width=0, silent=True),
        line("exchanged labels, 95 %", layers, main.exchanged_low_L, ("#0000", "#0000"), width=0)
        | {"fill": "tonexty", "fillcolor": GREY_BAND[0], "hoverinfo": "skip"},
        line("exchanged labels, mean", layers, main.exchanged_mean_L, GREY, dash="dot"),
    ]
    data[1]["meta"] = {"dark": {"fillcolor": GREY_BAND[1]}}
    data += [
        line(name, layers, each.bits_L, SERIES[place], marker=STYLES[place][0], dash=STYLES[place][1])
        for place, (name, each) in enumerate(texts.items())
    ]
    for trace in data[2:]:
        trace["hovertemplate"] = "%{y:.5f} bits"
    peak = int(main.bits_L.argmax())
    if main.bits_L.max() == 0:
        where = "On the same texts both" if of_pairs else "Both"
        sentence = f"{where} runs use every expert exactly alike: the divergence is 0 in every layer."
    else:
        clear = int((main.q_value_L < FALSE_DISCOVERIES).sum())
        sentence = (
            f"0 bits mean that both runs use a layer's experts alike, 1 bit that they share none; the grey band is "
            f"what {main.permutations} exchanges of {'the runs of a text' if of_pairs else 'whole sequences'} give. "
            f"Usage differs beyond it in {clear} of {len(layers)} layers (q < {FALSE_DISCOVERIES}), most in layer "
            f"{peak} with {main.bits_L[peak]:.5f} bits (p = {main.p_value_L[peak]:.2g})."
        )
    if not of_pairs:
        sentence += " As the texts are not the same, part of it is that of the texts."
    elif "all texts" in texts:
        sentence += " The band belongs to the line of the same texts; over all texts, part of the divergence is theirs."
    layout = line_layout("layer", "bits", height=340)
    layout["yaxis"] |= {"rangemode": "tozero", "exponentformat": "none"}
    layout["xaxis"] |= ticks(len(layers), 16)
    return Figure(
        key="comparison_usage",
        title="Divergence of expert usage",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["texts", "layer", "divergence, bits", "exchanged mean", "exchanged 2.5 %", "exchanged 97.5 %", "p",
                 "q"],
        rows=[[name, *row] for name, each in texts.items() for row in divergence_rows(each)],
    )  # fmt: skip


def share_figure(comparison: Comparison, names: tuple[str, str]) -> Figure:
    """Heatmap of the second run's share of selections less the first's, in percentage points."""
    divergence = _main(comparison)
    points_LE = 100 * divergence.difference_LE
    limit = float(np.abs(points_LE).max()) or 1.0
    trace = heatmap(points_LE, "diverging", zmin=-limit, zmax=limit) | {
        "hovertemplate": "layer %{y}, expert %{x}<br>%{z:+.3f} points<extra></extra>",
        "colorbar": {"ticksuffix": " pt", "tickformat": "+.2~g"},
    }
    layer, expert = (int(i) for i in np.unravel_index(int(np.abs(points_LE).argmax()), points_LE.shape))
    reach = 100 * divergence.exchanged_reach
    beyond = int((np.abs(points_LE) > reach + 1e-9).sum())
    if points_LE.any():
        sentence = (
            f"Orange marks experts that {names[1]} uses more than {names[0]}, blue ones less; most of all expert "
            f"{expert} of layer {layer}, by {abs(points_LE[layer, expert]):.2f} points "
            f"{'more' if points_LE[layer, expert] > 0 else 'less'}. {beyond or 'No'} of "
            f"{points_LE.size} cells {'differs' if beyond == 1 else 'differ'} by more than {reach:.2f} points, which "
            "in 95 % of the exchanges of labels no cell does."
        )
    else:
        sentence = f"{names[0]} and {names[1]} use every expert of every layer equally often"
        sentence += " on the same texts." if comparison.divergence_of_pairs is not None else "."
    return Figure(
        key="comparison_experts",
        title="Which experts gained and lost",
        sentence=sentence,
        spec={"data": [trace], "layout": heatmap_layout(*points_LE.shape)},
        columns=["layer", *(f"expert {each}, pt" for each in range(points_LE.shape[1]))],
        rows=[[number, *rounded(row, 3)] for number, row in enumerate(points_LE)],
        max_width=min(1080, 260 + 58 * points_LE.shape[1]),
    )


def effective_figure(comparison: Comparison, names: tuple[str, str]) -> Figure:
    """Effective number of experts per layer of each run, as a share of all where the runs have other numbers."""
    sizes = [counts_LE.shape[1] for counts_LE in comparison.counts]
    alike = sizes[0] == sizes[1]
    unit, digits = ("experts", 2) if alike else ("% of the experts", 1)
    data, rows, means = [], [], []
    for place, (name, effective_L) in enumerate(zip(names, comparison.effective_experts(), strict=True)):
        shown_L = effective_L if alike else 100 * effective_L / sizes[place]
        layers = list(range(len(shown_L)))
        trace = line(name, layers, shown_L, SERIES[place], marker=STYLES[place][0], dash=STYLES[place][1])
        data.append(trace | {"hovertemplate": f"%{{y:.2f}} {unit}"})
        means.append(float(shown_L.mean()))
        rows += [
            [name, layer, round(float(effective_L[layer]), 3), round(100 * float(effective_L[layer]) / sizes[place], 2)]
            for layer in layers
        ]
    layout = line_layout("layer", f"effective {unit}" if alike else f"effective experts, {unit}", height=320)
    layout["xaxis"] |= ticks(max(len(counts_LE) for counts_LE in comparison.counts), 16)
    sentence = (
        f"2 to the entropy of a layer's usage: how many evenly used experts would be as varied, of "
        f"{sizes[0] if alike else f'{sizes[0]} and {sizes[1]}'}; on the mean over layers "
        f"{means[0]:.{digits}f} {unit} in {names[0]} and {means[1]:.{digits}f} in {names[1]}."
    )
    if len(comparison.counts[0]) != len(comparison.counts[1]):
        sentence += " Each run is drawn over its own layers."
    return Figure(
        key="comparison_effective",
        title="Effective number of experts in both runs",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["run", "layer", "effective experts", "of all, %"],
        rows=rows,
    )


def divergence_rows(divergence: Divergence) -> list[list[Any]]:
    """Return a row per layer: bits, mean and 95 % interval under exchanged labels, p and q."""
    columns = np.stack(
        [
            divergence.bits_L,
            divergence.exchanged_mean_L,
            divergence.exchanged_low_L,
            divergence.exchanged_high_L,
            divergence.p_value_L,
            divergence.q_value_L,
        ],
        axis=-1,
    )
    return [[layer, *rounded(row, 6)] for layer, row in enumerate(columns)]


def _main(comparison: Comparison) -> Divergence:
    """Return the divergence of the same texts where there are any, else of all."""
    main = comparison.divergence_of_pairs or comparison.divergence
    assert main is not None
    return main
