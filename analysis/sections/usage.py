"""Section of expert usage: how often each expert is chosen, by data set, and whether that goes beyond chance."""

import numpy as np
from numpy.typing import NDArray

from analysis.counts.significance import benjamini_hochberg
from analysis.counts.usage import LEAST_SEQUENCES, Differences, MutualInformation, UsageCounts
from analysis.figures import (
    SERIES,
    Figure,
    Notice,
    Section,
    heatmap,
    heatmap_layout,
    line,
    line_layout,
    listed,
    rounded,
    ticks,
)
from analysis.heatmaps import ALPHA, small_multiples
from analysis.tokens import readable

SMALL_MULTIPLES = 12  # data sets drawn side by side; the table holds all of them
SMALL_P = 0.01  # of which chance alone has so many
MAX_OCTAVES = 3  # usage colours reach from 1/8 to 8 times uniform at most


def make(usage: UsageCounts) -> Section:
    """Return the section; the figures that compare data sets need two of them."""
    figures = [usage_figure(usage.share_LE())]
    information, differences = usage.mutual_information(), usage.differences()
    headline: list[tuple[str, str]] = []
    notices: list[Notice] = []
    if information is not None and differences is not None:
        figures.append(dataset_figure(differences, usage))
        figures.append(mutual_information_figure(information))
        beyond = max(information.bits_L - information.shuffled_mean_L, default=0.0)
        headline.append(
            ("bits about the data set in one choice beyond chance, at most", f"{max(float(beyond), 0.0):.3f}")
        )
    else:
        notices.append(too_few(usage, "see how their usage differs"))
    return Section(
        key="usage",
        title="Expert usage",
        lead=(
            "A router that always chose the same experts would be easy to predict and a waste of the others; training "
            "balances them, more or less. Where data sets are compared, labels are shuffled over whole sequences, "
            "since the tokens of one text are not independent."
        ),
        figures=tuple(figures),
        notices=tuple(notices),
        headline=tuple(headline),
    )


def too_few(usage: UsageCounts, aim: str) -> Notice:
    """Return why data sets are not compared, and how to get a run in which they are."""
    if len(usage.datasets) == 1:
        reason = "This run holds one data set."
    else:
        reason = f"Fewer than two data sets of this run have {LEAST_SEQUENCES} sequences."
    return Notice(
        f"{reason} Trace several, with {LEAST_SEQUENCES} sequences of each or more, to {aim}:",
        ("expert-speculation collect --datasets installed --target_traces 400",),
    )


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
        trace |= {"text": [[f"{share:.1f}" for share in row] for row in 100 * share_LE], "texttemplate": "%{text}"}
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
        + (
            f"{unused} of the {share_LE.size} are never chosen."
            if unused
            else f"all {share_LE.size} are chosen at times."
        )
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


def dataset_figure(differences: Differences, usage: UsageCounts) -> Figure:
    """Small multiples, one per data set: its usage less the mean over data sets, in percentage points."""
    points_DLE, q_DLE = 100 * differences.difference_DLE, differences.q_DLE
    num_datasets, num_layers, num_experts = points_DLE.shape
    datasets, compared = usage.datasets, usage.compared
    shown = sorted(np.argsort(-usage.tokens_D, kind="stable")[:SMALL_MULTIPLES].tolist())
    spec, min_width = small_multiples([datasets[d] for d in shown], points_DLE[shown], q_DLE[shown])
    clear_DLE = q_DLE < ALPHA
    tested = (
        f"(q < {ALPHA}, Benjamini-Hochberg over {clear_DLE[compared].size} cells; p from "
        f"{differences.permutations} permutations of the labels over sequences)"
    )
    sentence = (
        "Orange marks experts that a data set uses more than the mean over data sets, blue less; faded cells may be "
        "chance. "
    )
    if clear_DLE.any():
        strongest = np.where(clear_DLE, np.abs(points_DLE), 0.0)
        d, layer, expert = (int(i) for i in np.unravel_index(int(strongest.argmax()), strongest.shape))
        sentence += (
            f"{per_cent_of_cells(clear_DLE[compared])} are beyond chance {tested}; most of all, "
            f"{readable(datasets[d])} uses expert {expert} of layer {layer} "
            f"{'more' if points_DLE[d, layer, expert] > 0 else 'less'}, by {strongest.max():.1f} points."
        )
    else:
        sentence += f"Here no single cell is beyond chance {tested}."
    small_D = np.array([(differences.p_DLE[d] < SMALL_P).mean() for d in compared])
    most = int(small_D.argmax())
    sentence += (
        f" Of all cells {100 * small_D.mean():.1f} % have p < {SMALL_P}, most in {readable(datasets[compared[most]])} "
        f"({100 * small_D[most]:.1f} %); chance alone gives {100 * SMALL_P:g} %."
    )
    if left_out := [readable(datasets[d]) for d in range(num_datasets) if d not in compared]:
        sentence += (
            f" With fewer than {LEAST_SEQUENCES} sequences, {listed(left_out)} {'is' if len(left_out) == 1 else 'are'} "
            "drawn but not tested, and no part of the mean."
        )
    if len(shown) < num_datasets:
        sentence += f" The {len(shown)} data sets with most tokens are drawn; the table holds all {num_datasets}."
    return Figure(
        key="datasets",
        title="Difference to the mean over data sets",
        min_width=min_width,
        sentence=sentence,
        spec=spec,
        columns=[
            "data set",
            "layer",
            *(f"expert {expert}, pt" for expert in range(num_experts)),
            *(f"expert {expert}, q" for expert in range(num_experts)),
        ],
        rows=[
            [readable(datasets[d]), layer, *rounded(points_DLE[d, layer], 2), *rounded(q_DLE[d, layer], 3)]
            for d in range(num_datasets)
            for layer in range(num_layers)
        ],
    )


def per_cent_of_cells(clear: NDArray[np.bool_]) -> str:
    """Return which part of the cells it is in words, never `0 %` of some."""
    share = 100 * clear.mean()
    return f"{clear.sum()} of all cells" if share < 1 else f"{share:.0f} % of all cells"


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
    q_L = benjamini_hochberg(information.p_value_L)
    clear_L = q_L < ALPHA
    beyond_L = information.bits_L - information.shuffled_mean_L
    sentence = (
        "Where the line stands above the grey band, an expert choice says which data set the text is from beyond what "
        f"shuffled labels give: {clear_L.sum() or 'none'} of {len(layers)} layers "
        f"{'does' if clear_L.sum() == 1 else 'do'} so beyond chance (q < {ALPHA}, Benjamini-Hochberg over layers; "
        f"{information.permutations} permutations over sequences)"
    )
    if clear_L.any():
        peak = int(np.where(clear_L, beyond_L, -np.inf).argmax())
        sentence += (
            f", most of all layer {peak} with {information.bits_L[peak]:.3f} bits, where shuffled labels give "
            f"{information.shuffled_mean_L[peak]:.3f} (p = {information.p_value_L[peak]:.2g})"
        )
    sentence += "."
    layout = line_layout("layer", "bits", height=320) | {"yaxis": {"title": {"text": "bits"}, "rangemode": "tozero"}}
    layout["xaxis"] |= ticks(len(layers), 16)
    return Figure(
        key="information",
        title="Mutual information between data set and expert",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=["layer", "observed, bits", "shuffled mean", "shuffled 2.5 %", "shuffled 97.5 %", "p", "q"],
        rows=[
            [layer, *(rounded(np.array(values), 5))]
            for layer, values in enumerate(
                zip(
                    information.bits_L,
                    information.shuffled_mean_L,
                    information.shuffled_low_L,
                    information.shuffled_high_L,
                    information.p_value_L,
                    q_L,
                    strict=True,
                )
            )
        ],
    )
