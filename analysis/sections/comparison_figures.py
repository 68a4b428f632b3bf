"""Figures of two runs side by side: agreement on the same texts, divergence of usage, experts gained and lost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.comparison import Comparison
from analysis.counts.divergence import Divergence
from analysis.figures import (
    SERIES,
    Figure,
    band,
    dots,
    dots_layout,
    heatmap,
    heatmap_layout,
    line,
    line_layout,
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
GREY_BAND = ("rgba(110,116,124,0.22)", "rgba(170,176,184,0.22)")
SHOWN_DATASETS = 24  # with most tokens; the table holds all of them
FALSE_DISCOVERIES = 0.05


def make(comparison: Comparison, names: tuple[str, str], top_k: tuple[int, int]) -> Iterator[Figure]:
    """Yield the figures that two runs, by their names, allow."""
    if comparison.agreement is not None and comparison.expected_shared_L is not None:
        yield agreement_figure(comparison.agreement, comparison.expected_shared_L, top_k)
        yield dataset_figure(comparison.agreement)
        if "weight_distance" in comparison.agreement:
            yield weight_figure(comparison.agreement)
    if comparison.divergence is not None:
        yield divergence_figure(comparison)
        yield share_figure(_main(comparison), names)
    yield effective_figure(comparison, names)


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
        f"{100 * agreement['shared']['value']:.1f} % are chosen by both runs on the mean over layers, from "
        f"{100 * shared_L[least]:.1f} % in layer {least} to {100 * shared_L[most]:.1f} % in layer {most}; two runs "
        f"that chose apart from each other, each expert as often as here, would share {100 * expected_L.mean():.1f} %."
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
    sentence = (
        f"Each dot is a data set's agreement, each bar its 95 % interval over sequences: the runs agree least on "
        f"{readable(drawn[0])} ({100 * by_dataset[drawn[0]]['shared']['value']:.1f} % of the experts shared)"
    )
    if len(drawn) > 1:
        sentence += (
            f" and most on {readable(drawn[-1])} ({100 * by_dataset[drawn[-1]]['shared']['value']:.1f} %)"
        )  # fmt: skip
    sentence += "."
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
            f"Half the sum of the absolute differences of a token's weights, each run's scaled to sum 1: 0 where both "
            f"mix the same experts alike, 1 where they share none; on the mean over layers {mean:.4f}, most in layer "
            f"{int(values.argmax())} with {values.max():.4f}."
        ),
        spec={"data": [*band(name, layers, low, high, SERIES[0]), trace], "layout": layout},
        columns=["layer", "distance", "95 % from", "to"],
        rows=[[layer, *rounded(np.array([values[layer], low[layer], high[layer]]), 5)] for layer in layers],
    )


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
        line(name, layers, each.bits_L, SERIES[place], marker=MARKERS[place], dash=("solid", "dash")[place])
        for place, (name, each) in enumerate(texts.items())
    ]
    for trace in data[2:]:
        trace["hovertemplate"] = "%{y:.5f} bits"
    peak = int(main.bits_L.argmax())
    if main.bits_L.max() == 0:
        sentence = "Both runs use every expert exactly alike: the divergence is 0 in every layer."
    else:
        clear = int((main.q_value_L < FALSE_DISCOVERIES).sum())
        sentence = (
            f"0 bits mean that both runs use a layer's experts alike, 1 bit that they share none; the grey band is "
            f"what {main.permutations} exchanges of {'the runs of a text' if of_pairs else 'whole sequences'} give. "
            f"Usage differs beyond it in {clear} of {len(layers)} layers (q < {FALSE_DISCOVERIES}), most in layer "
            f"{peak} with {main.bits_L[peak]:.5f} bits (p = {main.p_value_L[peak]:.3g})."
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


def share_figure(divergence: Divergence, names: tuple[str, str]) -> Figure:
    """Heatmap of the second run's share of selections less the first's, in percentage points."""
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
            f"{expert} of layer {layer}, by {points_LE[layer, expert]:+.2f} points. {beyond or 'No'} of "
            f"{points_LE.size} cells {'differs' if beyond == 1 else 'differ'} by more than {reach:.2f} points, which "
            "in 95 % of the exchanges of labels no cell does."
        )
    else:
        sentence = f"{names[0]} and {names[1]} use every expert of every layer equally often."
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
    unit = "experts" if alike else "% of the experts"
    data, rows, means = [], [], []
    for place, (name, effective_L) in enumerate(zip(names, comparison.effective_experts(), strict=True)):
        shown_L = effective_L if alike else 100 * effective_L / sizes[place]
        layers = list(range(len(shown_L)))
        trace = line(name, layers, shown_L, SERIES[place], marker=MARKERS[place], dash=("solid", "dash")[place])
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
        f"{sizes[0] if alike else f'{sizes[0]} and {sizes[1]}'}; on the mean over layers {means[0]:.2f} {unit} in "
        f"{names[0]} and {means[1]:.2f} in {names[1]}."
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


def _ends(metrics: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.float64], ...]:
    """Return values, lower and upper ends in per cent."""
    return tuple(np.array([100 * metric[end] for metric in metrics]) for end in ("value", "low", "high"))


def _percents(metric: Mapping[str, float]) -> list[float]:
    return [round(100 * metric[end], 2) for end in ("value", "low", "high")]
