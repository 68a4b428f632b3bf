"""Section of temporal locality: how long an expert stays in use, and what a cache of recent experts would hit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.cache import StackDistances, static_hit_rate_LC
from analysis.counts.locality import DISTANCES, WINDOWS, LocalityCounts
from analysis.figures import SERIES, Figure, Section, band, line, line_layout, rounded, ticks

GREY = ("#7b828b", "#959ba3")
FAINT = ("#b4b9bf", "#666d75")


def make(locality: LocalityCounts, stacks: StackDistances, share_LE: NDArray[np.float64]) -> Section:
    """Return the section; `share_LE` is each expert's share of its layer's selections."""
    hits_LC, static_LC = stacks.hit_rate_LC(), static_hit_rate_LC(share_LE)
    return Section(
        key="locality",
        title="Temporal locality",
        lead=(
            "A cache pays where experts that were used are soon used again. Grey lines show what tokens would give "
            "that "
            "chose independently of each other, each expert as often as here."
        ),
        figures=(
            reuse_figure(locality),
            working_set_figure(locality),
            hit_rate_figure(hits_LC, static_LC, stacks.top_k),
            hit_rate_by_layer_figure(hits_LC, stacks.top_k),
        ),
    )


def reuse_figure(locality: LocalityCounts) -> Figure:
    """Part of a token's experts that an earlier token used, against the distance between the two."""
    reuse_RL = 100 * locality.reuse_RL()
    known = locality.pairs_R > 0
    distances = [distance for distance, each in zip(DISTANCES, known, strict=True) if each]
    reuse_RL = reuse_RL[known]
    chance_L = 100 * locality.independent_reuse_L()
    data = [
        *_mean_with_range("layers: mean and range", distances, reuse_RL, SERIES[0]),
        line("independent tokens", distances, np.full(len(distances), chance_L.mean()), GREY, dash="dot"),
    ]
    for trace in data:
        trace.setdefault("hovertemplate", "%{y:.1f} %")
    layout = _log_layout("distance in tokens", "experts used again", distances)
    layout["yaxis"] |= {"ticksuffix": " %", "rangemode": "tozero"}
    if distances:
        best = int(reuse_RL[0].argmax())
        sentence = (
            f"Of a token's experts the previous token used {reuse_RL[0].mean():.1f} % on average, most in layer {best} "
            f"with {reuse_RL[0, best]:.1f} %, and the token {distances[-1]} places before still "
            f"{reuse_RL[-1].mean():.1f} %; independent tokens would share {chance_L.mean():.1f} %. What stays above "
            "the dotted line at long distances belongs to the text as a whole."
        )
    else:
        sentence = "Every sequence here is a single token, so there is no reuse to show."
    return Figure(
        key="reuse",
        title="Reuse of experts against distance",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=[
            "distance, tokens",
            "mean, %",
            "independent, %",
            *(f"layer {each}, %" for each in range(reuse_RL.shape[1])),
        ],
        rows=[
            [distance, *rounded(np.array([row.mean(), chance_L.mean()]), 3), *rounded(row, 2)]
            for distance, row in zip(distances, reuse_RL, strict=True)
        ],
        max_width=860,
    )


def working_set_figure(locality: LocalityCounts) -> Figure:
    """Mean number of different experts that a window of tokens uses, against its length."""
    known = locality.windows_W > 0
    windows = [window for window, each in zip(WINDOWS, known, strict=True) if each]
    distinct_WL = locality.working_set_WL()[known]
    independent_WL = locality.independent_working_set_WL()[known]
    experts = locality.num_experts
    data = [
        *_mean_with_range("layers: mean and range", windows, distinct_WL, SERIES[0]),
        line("independent tokens", windows, independent_WL.mean(axis=1), GREY, dash="dot", marker="circle-open"),
        line("all experts", windows, np.full(len(windows), float(experts)), FAINT, dash="dash"),
    ]
    for trace in data:
        trace.setdefault("hovertemplate", "%{y:.1f}")
    layout = _log_layout("window in tokens", "different experts of a layer", windows)
    layout["yaxis"] |= {"rangemode": "tozero"}
    at = int(np.searchsorted(windows, 16)) if windows[-1] >= 16 else len(windows) - 1
    sentence = (
        f"A stretch of {windows[at]} tokens uses {distinct_WL[at].mean():.1f} of a layer's {experts} experts on "
        f"average, between {distinct_WL[at].min():.1f} and {distinct_WL[at].max():.1f} by layer; independent tokens "
        f"would use {independent_WL[at].mean():.1f}. Long windows come from the sequences long enough for them."
    )
    return Figure(
        key="working_set",
        title="Working set against window",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=[
            "window, tokens",
            "windows",
            "mean experts",
            "independent",
            *(f"layer {each}" for each in range(distinct_WL.shape[1])),
        ],
        rows=[
            [window, int(number), *rounded(np.array([row.mean(), independent.mean()]), 3), *rounded(row, 3)]
            for window, number, row, independent in zip(
                windows, locality.windows_W[known], distinct_WL, independent_WL, strict=True
            )
        ],
        max_width=860,
    )


def hit_rate_figure(hits_LC: NDArray[np.float64], static_LC: NDArray[np.float64], top_k: int) -> Figure:
    """Hits of an LRU cache against its size, beside a cache that never changes."""
    num_experts = hits_LC.shape[1] - 1
    sizes = list(range(top_k, num_experts + 1))
    hits_CL, static_CL = 100 * hits_LC[:, top_k:].T, 100 * static_LC[:, top_k:].T
    even = 100 * np.array(sizes) / num_experts
    data = [
        *_mean_with_range(
            "least recently used goes: mean and range of layers", sizes, hits_CL, SERIES[0], marker=False
        ),
        line("the most used experts stay", sizes, static_CL.mean(axis=1), SERIES[1], dash="dash"),
        line("any experts stay", sizes, even, GREY, dash="dot"),
    ]
    for trace in data:
        trace.setdefault("hovertemplate", "%{y:.1f} %")
    layout = line_layout("experts per layer that the cache holds", "hits", height=360)
    layout["yaxis"] |= {"ticksuffix": " %", "range": [0, 102]}
    half = sizes[len(sizes) // 2] if num_experts // 2 < top_k else num_experts // 2
    at = half - top_k
    gain = hits_CL[at].mean() - static_CL[at].mean()
    sentence = (
        f"With room for {half} of {num_experts} experts in every layer, a cache that drops the least recently used "
        "expert "
        f"hits {hits_CL[at].mean():.1f} % of lookups, from {hits_CL[at].min():.1f} to {hits_CL[at].max():.1f} % by "
        "layer; "
        f"always keeping the most used ones hits {static_CL[at].mean():.1f} %, so recency "
        f"{'is worth' if gain > 0 else 'costs'} {abs(gain):.1f} points. Counted exactly from stack distances, token "
        "after "
        "token, every text beginning with an empty cache."
    )
    return Figure(
        key="hit_rate",
        title="Hits of a cache of recent experts",
        sentence=sentence,
        spec={"data": data, "layout": layout},
        columns=[
            "experts held",
            "mean hits, %",
            "most used stay, %",
            "any stay, %",
            *(f"layer {each}, %" for each in range(hits_CL.shape[1])),
        ],
        rows=[
            [size, *rounded(np.array([row.mean(), static.mean(), evenly]), 2), *rounded(row, 2)]
            for size, row, static, evenly in zip(sizes, hits_CL, static_CL, even, strict=True)
        ],
        max_width=860,
    )


def hit_rate_by_layer_figure(hits_LC: NDArray[np.float64], top_k: int) -> Figure:
    """Hits of the LRU cache by layer, for caches of a quarter, half and three quarters of the experts."""
    num_layers, num_experts = len(hits_LC), hits_LC.shape[1] - 1
    sizes = sorted({max(top_k, round(num_experts * part)) for part in (0.25, 0.5, 0.75)})
    layers = list(range(num_layers))
    data = []
    for size, colours, marker in zip(sizes, SERIES, ("circle", "square", "diamond"), strict=False):
        trace = line(f"{size} of {num_experts} experts held", layers, 100 * hits_LC[:, size], colours, marker=marker)
        data.append(trace | {"hovertemplate": "%{y:.1f} %"})
    layout = line_layout("layer", "hits", height=320)
    layout["yaxis"] |= {"ticksuffix": " %"}
    layout["xaxis"] |= ticks(num_layers, 16)
    middle = hits_LC[:, sizes[len(sizes) // 2]]
    low, high = int(middle.argmin()), int(middle.argmax())
    return Figure(
        key="hit_rate_by_layer",
        title="Hits of the cache by layer",
        sentence=(
            f"The lower a layer's point, the more room it needs for the same hits: with {sizes[len(sizes) // 2]} "
            "experts held, layer "
            f"{low} hits {100 * middle[low]:.1f} % and layer {high} {100 * middle[high]:.1f} %."
        ),
        spec={"data": data, "layout": layout},
        columns=["layer", *(f"{size} held, %" for size in sizes)],
        rows=[[layer, *rounded(100 * hits_LC[layer, sizes], 2)] for layer in layers],
    )


def _mean_with_range(
    name: str, x: list[int], values_XL: NDArray[np.float64], colours: tuple[str, str], *, marker: bool = True
) -> list[dict[str, Any]]:
    if not x:
        return [line(name, [], np.zeros(0), colours)]
    mean = line(name, x, values_XL.mean(axis=1), colours, marker="circle" if marker else "", width=2.5, group=name)
    return [*band(name, x, values_XL.min(axis=1), values_XL.max(axis=1), colours), mean]


def _log_layout(x_title: str, y_title: str, x: list[int]) -> dict[str, Any]:
    layout = line_layout(x_title, y_title, height=340)
    layout["xaxis"] |= {
        "type": "log",
        "tickvals": [each for each in x if each & (each - 1) == 0],
        "ticktext": [str(each) for each in x if each & (each - 1) == 0],
        "minor": {"ticks": ""},
    }
    return layout
