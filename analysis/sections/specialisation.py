"""Section of specialisation: how evenly layers use their experts, and which experts belong to one data set."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.counts.specialisation import Focus, effective_number, entropy_bits, focus, gini
from analysis.counts.usage import LEAST_SEQUENCES, UsageCounts, shares
from analysis.figures import (
    SERIES,
    Figure,
    Section,
    band,
    heatmap,
    heatmap_layout,
    line,
    line_layout,
    rounded,
    ticks,
)
from analysis.heatmaps import ALPHA, veil
from analysis.sections.usage import too_few
from analysis.tokens import readable

GREY = ("#7b828b", "#959ba3")


def make(usage: UsageCounts) -> Section:
    """Return the section; focus needs two data sets."""
    figures = [evenness_figure(usage)]
    notices = []
    focused = focus(usage)
    if focused is None:
        notices.append(too_few(usage, "see whether experts belong to single ones"))
    else:
        figures += [
            focus_by_layer_figure(focused, len(usage.compared)),
            focus_figure(focused, usage.datasets, len(usage.compared)),
        ]
    return Section(
        key="specialisation",
        title="Specialisation",
        lead=(
            "Experts may share the work of a layer evenly over all texts and still divide it by kind of text: the "
            "first is measured by the spread of a layer's selections, the second by an expert's focus, the part of its "
            "selections that come from its favourite data set, all data sets weighed alike."
            + (
                f" Those of fewer than {LEAST_SEQUENCES} sequences are left out where data sets are compared."
                if len(usage.compared) < len(usage.datasets)
                else ""
            )
        ),
        figures=tuple(figures),
        notices=tuple(notices),
    )


def evenness_figure(usage: UsageCounts) -> Figure:
    """Effective number of experts and Gini coefficient by layer, of all text and of single data sets."""
    share_LE, share_DLE = usage.share_LE(), shares(usage.counts_DLE[usage.compared])
    num_layers, num_experts = share_LE.shape
    several = len(usage.compared) > 1
    compared = [usage.datasets[d] for d in usage.compared]
    layers = list(range(num_layers))
    data = []
    layout = line_layout("layer", "effective number of experts", height=340)
    gap, half = 0.09, 0.455
    measures = (
        ("effective number of experts", effective_number(share_LE), effective_number(share_DLE), "%{y:.2f}"),
        ("Gini coefficient", gini(share_LE), gini(share_DLE), "%{y:.3f}"),
    )
    for place, (_, all_L, single_DL, form) in enumerate(measures):
        axes = {"xaxis": "x2", "yaxis": "y2"} if place else {}
        if several:
            data += [
                t | axes for t in band("one data set", layers, single_DL.min(axis=0), single_DL.max(axis=0), SERIES[1])
            ]
            mean = line("one data set: mean and range", layers, single_DL.mean(axis=0), SERIES[1], marker="square")
            data.append(mean | axes | {"hovertemplate": form, "showlegend": not place, "legendgroup": "one data set"})
        whole = line("all text", layers, all_L, SERIES[0], marker="circle", group="all text")
        data.append(whole | axes | {"hovertemplate": form, "showlegend": not place})
    for axis in ("xaxis", "xaxis2"):
        layout[axis] = {"title": {"text": "layer"}, "showgrid": False, "zeroline": False} | ticks(num_layers, 12)
    layout["xaxis"]["domain"], layout["xaxis2"]["domain"] = [0, half], [half + gap, 1]
    layout["yaxis2"] = {"title": {"text": "Gini coefficient"}, "zeroline": False, "rangemode": "tozero", "anchor": "x2"}
    layout["xaxis2"]["anchor"] = "y2"
    layout["yaxis"] |= {"rangemode": "tozero"}
    effective_L, single_DL = measures[0][1], measures[0][2]
    least = int(effective_L.argmin())
    sentence = (
        f"A layer that uses all experts alike has {num_experts} effective experts (2 to the entropy of its shares) and "
        "a "
        f"Gini coefficient of 0: over all text the layers have {effective_L.mean():.1f} on average, fewest in layer "
        f"{least} with {effective_L[least]:.1f}"
    )
    if several:
        sentence += (
            f"; within one data set it is {single_DL.mean():.1f}, and a gap between the two shows specialisation (in "
            "small data sets, chance too)"
        )
    return Figure(
        key="evenness",
        title="How evenly the experts are used",
        sentence=sentence + ".",
        spec={"data": data, "layout": layout},
        columns=[
            "layer",
            "entropy, bits",
            "entropy, % of the most possible",
            "effective experts",
            "Gini",
            *(f"effective experts, {readable(name)}" for name in compared if several),
        ],
        rows=[
            [
                layer,
                *rounded(
                    np.array(
                        [bits, 100 * bits / max(np.log2(num_experts), 1e-12), effective_L[layer], measures[1][1][layer]]
                    ),
                    4,
                ),
                *(rounded(single_DL[:, layer], 3) if several else []),
            ]
            for layer, bits in enumerate(entropy_bits(share_LE))
        ],
        min_width=520,
    )


def focus_by_layer_figure(focused: Focus, num_datasets: int) -> Figure:
    """Mean and greatest focus of a layer's experts, beside what shuffled labels give."""
    layers = list(range(len(focused.focus_LE)))
    mean_L, most_L, chance_L = (
        np.array([reduce(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in 100 * values_LE])
        for reduce, values_LE in ((np.mean, focused.focus_LE), (np.max, focused.focus_LE), (np.mean, focused.chance_LE))
    )
    data = [
        line("most focused expert", layers, most_L, SERIES[1], marker="square"),
        line("mean over experts", layers, mean_L, SERIES[0], marker="circle", width=2.5),
        line("mean under shuffled labels", layers, chance_L, GREY, dash="dot"),
    ]
    for trace in data:
        trace["hovertemplate"] = "%{y:.1f} %"
    clear = int((focused.q_LE < ALPHA).sum())
    layout = line_layout("layer", "focus", height=320)
    layout["yaxis"] |= {"ticksuffix": " %"}
    layout["xaxis"] |= ticks(len(layers), 16)
    return Figure(
        key="focus_by_layer",
        title="Focus by layer",
        sentence=(
            f"An expert that serves the {num_datasets} data sets alike has a focus of {100 / num_datasets:.1f} %, and "
            f"chance alone gives {np.nanmean(chance_L):.1f} %; on average experts reach {np.nanmean(mean_L):.1f} %, "
            "most "
            f"in layer {int(np.nanargmax(mean_L))} with {np.nanmax(mean_L):.1f} %, and {clear} of "
            f"{focused.focus_LE.size} experts lie beyond chance (q < {ALPHA})."
        ),
        spec={"data": data, "layout": layout},
        columns=[
            "layer",
            "mean focus, %",
            "greatest focus, %",
            "mean under shuffled labels, %",
            "experts beyond chance",
        ],
        rows=[
            [
                layer,
                *rounded(np.array([mean_L[layer], most_L[layer], chance_L[layer]]), 2),
                int((focused.q_LE[layer] < ALPHA).sum()),
            ]
            for layer in layers
        ],
    )


def focus_figure(focused: Focus, datasets: Sequence[str], compared: int) -> Figure:
    """Heatmap of every expert's focus; the table lists the experts from most to least focused."""
    percent_LE: NDArray[np.float64] = 100 * focused.focus_LE
    num_layers, num_experts = percent_LE.shape
    names = [readable(name) for name in datasets]
    trace = heatmap(percent_LE, "sequential", zmin=100 / compared, zmax=float(np.nanmax(percent_LE))) | {
        "customdata": [[names[d] for d in row] for row in focused.favourite_LE.tolist()],
        "hovertemplate": "layer %{y}, expert %{x}<br>%{z:.1f} % from %{customdata}<extra></extra>",
        "colorbar": {"ticksuffix": " %"},
    }
    gap = {"xgap": trace["xgap"], "ygap": trace["ygap"]}
    order = np.argsort(-np.nan_to_num(percent_LE, nan=-1.0), axis=None, kind="stable")
    places = [tuple(int(i) for i in np.unravel_index(place, percent_LE.shape)) for place in order]
    clear_LE = focused.q_LE < ALPHA
    layer, expert = next((place for place in places if clear_LE[place]), places[0])
    return Figure(
        key="focus",
        title="Focus of every expert",
        sentence=(
            "The stronger a cell's colour, the more of the expert's selections come from one data set; faded cells "
            f"may be chance. The most focused{' beyond chance' if clear_LE.any() else ''} is expert {expert} of layer "
            f"{layer}, {percent_LE[layer, expert]:.1f} % of whose selections come from "
            f"{names[focused.favourite_LE[layer, expert]]} (shuffled labels give "
            f"{100 * focused.chance_LE[layer, expert]:.1f} % on average; "
            f"q {'< 0.001' if focused.q_LE[layer, expert] < 0.001 else f'= {focused.q_LE[layer, expert]:.2g}'})"
            + ("" if clear_LE.any() else ", and no expert is beyond chance once all of them are tested")
            + "; the table lists all from most to least focused."
        ),
        spec={"data": [trace, veil(clear_LE) | gap], "layout": heatmap_layout(num_layers, num_experts)},
        columns=["layer", "expert", "favourite data set", "focus, %", "under shuffled labels, %", "p", "q"],
        rows=[
            [
                *place,
                names[focused.favourite_LE[place]],
                *rounded(np.array([percent_LE[place], 100 * focused.chance_LE[place]]), 2),
                *rounded(np.array([focused.p_LE[place], focused.q_LE[place]]), 4),
            ]
            for place in places
        ],
        max_width=min(1080, 260 + 58 * num_experts),
    )
