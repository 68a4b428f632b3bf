"""Figures of what prefetching buys at other cache sizes and links, and how good a guess must be there to pay."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import Figure, band, grouped, line, line_layout
from analysis.sections.prefetching_words import Axis, Point, break_even_words, gain_words
from analysis.simulations import GREY, Simulation, alike, predictor_names, style
from analysis.tokens import readable

SYMBOLS = {"above": "circle", "always": "triangle-down", "never": "x"}
UPPER, LOWER = [0.42, 1], [0, 0.31]  # of the height: speeds, and recall that breaks even
HEIGHT = 560  # px
HEADROOM = 1.1  # above the fastest


def cache_figure(simulation: Simulation) -> Figure:
    """Tokens per second, and the recall that breaks even, against the share of experts that the GPU holds."""
    points, axis = _cache(simulation)
    sizes = [point["cache_experts"] for point in points]
    return _figure(
        simulation, points, axis, "prefetching_cache", "If the GPU held more or fewer experts",
        "How many tokens a second each reaches by the share of all experts that the GPU holds",
        {"experts on the GPU": sizes, "of all experts, %": [round(value, 2) for value in axis.values]},
    )  # fmt: skip


def link_figure(simulation: Simulation) -> Figure:
    """Tokens per second, and the recall that breaks even, against the speed of the link."""
    points, axis = _link(simulation)
    return _figure(
        simulation, points, axis, "prefetching_link", "If the link were faster or slower",
        "How many tokens a second each reaches by the speed of the link that experts come over",
        {"link, GB/s": alike(axis.values), "times the machine's": [point["link_factor"] for point in points]},
    )  # fmt: skip


def sweeps_figure(simulation: Simulation) -> Figure:
    """Both side by side, for a picture that stands alone."""
    layout = line_layout("", "", height=HEIGHT)
    data: list[dict[str, Any]] = []
    for column, (points, axis) in enumerate((_cache(simulation), _link(simulation))):
        data += _panels(simulation, points, axis, layout, column, 2)
    hardware, model = simulation["hardware"]["name"], simulation["model_profile"]["name"]
    return Figure(
        key="prefetching_sweeps",
        title=f"What prefetching buys for {model} on {hardware}",
        sentence="",
        spec={"data": data, "layout": layout},
        columns=[],
        rows=[],
    )


def _cache(simulation: Simulation) -> tuple[Sequence[Point], Axis]:
    points, machine = simulation["sweep"]["by_cache"], simulation["machine"]
    return points, Axis(
        "experts that the GPU holds, of all",
        [100 * point["share"] for point in points],
        100 * machine["cache_experts"] / machine["experts"],
        lambda value: f"with {value:.3g} % held",
        {"ticksuffix": " %"},
    )


def _link(simulation: Simulation) -> tuple[Sequence[Point], Axis]:
    points, speed = simulation["sweep"]["by_link"], simulation["hardware"]["link_gb_s"]
    values = [speed * point["link_factor"] for point in points]
    return points, Axis(
        "speed of the link, GB/s",
        values,
        speed,
        lambda value: f"at {value:.3g} GB/s",
        {"type": "log", "tickvals": values, "tickformat": ".3~g"},
    )


def _figure(
    simulation: Simulation, points: Sequence[Point], axis: Axis, key: str, title: str, first: str,
    varied: Mapping[str, Sequence[Any]],
) -> Figure:  # fmt: skip
    layout = line_layout("", "", height=HEIGHT)
    data = _panels(simulation, points, axis, layout)
    sweep, name = simulation["sweep"], _drawn(simulation)
    shown = name or "perfect"
    speeds = {each: [point["tokens_per_s"][each] for point in points] for each in sweep["policies"]}
    return Figure(
        key=key,
        title=title,
        sentence=(
            f"{first}, on {grouped(sweep['tokens'])} of the tokens; the vertical line is the set-up simulated. "
            f"{gain_words(points, shown, axis)}. Below, the recall from which guesses are no slower than none, found "
            "with made-up ones that are right or blind, and shaded where prefetching pays: "
            + break_even_words(
                points, axis, _recall(simulation, name), shown, threshold=simulation["settings"]["threshold"]
            )
        ),
        spec={"data": data, "layout": layout},
        columns=[*varied, *(f"{readable(each)}, tokens/s" for each in speeds), f"times as fast with {readable(shown)}",
                 "break-even recall, %", "so it pays"],
        rows=[
            list(cells)
            for cells in zip(
                *varied.values(),
                *map(alike, speeds.values()),
                [round(with_it / alone, 3) for with_it, alone in zip(speeds[shown], speeds["none"], strict=True)],
                [_per_cent(point["break_even"]["recall"]) for point in points],
                [{"above": "from there", "always": "always", "never": "never"}[point["break_even"]["pays"]]
                 for point in points],
                strict=True,
            )
        ],
        max_width=900,
    )  # fmt: skip


def _panels(
    simulation: Simulation, points: Sequence[Point], axis: Axis, layout: dict[str, Any], column: int = 0,
    columns: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the traces of speeds above and of recall below, and put their axes into the layout."""
    x, upper, lower = ("", "", "2") if column == 0 else ("2", "3", "4")
    above, below = {"xaxis": f"x{x}", "yaxis": f"y{upper}"}, {"xaxis": f"x{x}", "yaxis": f"y{lower}"}
    once = {"showlegend": column == 0}
    sweep, name = simulation["sweep"], _drawn(simulation)
    data, most = [], 0.0
    for each, policy in sweep["policies"].items():
        look, speeds = style(simulation, each), np.array([point["tokens_per_s"][each] for point in points])
        most = max(most, float(speeds.max()))
        curve = line(f"{each} ({policy})", axis.values, speeds, look.colours, marker=look.marker, dash=look.dash)
        data.append(curve | above | once | {"hovertemplate": "%{y:.2f} tokens/s"})
    marked = {"hoverinfo": "skip", "legendgroup": "set-up"}
    recalls = [point["break_even"]["recall"] for point in points]
    drawn = np.array([100.0 if recall is None else 100 * recall for recall in recalls])
    hidden, region = band("prefetching pays", axis.values, drawn, np.full(len(points), 100.0), GREY)
    data += [
        line("set-up simulated", [axis.at] * 2, np.array([0, HEADROOM * most]), GREY, dash="dot", width=1.5)
        | above | once | marked,
        line("set-up simulated", [axis.at] * 2, np.array([0.0, 100.0]), GREY, dash="dot", width=1.5)
        | below | marked | {"showlegend": False},
        _break_even_line(points, axis, drawn) | below | once,
        hidden | below,
        region | below | once | {"name": "prefetching pays"},
    ]  # fmt: skip
    recall = _recall(simulation, name)
    if name is not None and recall is not None:
        level, colours = np.full(len(points), 100 * recall), style(simulation, name).colours
        own = line(f"recall of {name}", axis.values, level, colours, dash="dash")
        data.append(own | below | once | {"hovertemplate": "%{y:.1f} %"})
    width = (1 - 0.09 * (columns - 1)) / columns
    layout[f"xaxis{x}"] = {
        **{"title": {"text": axis.title}, "showgrid": False, "zeroline": False, "anchor": f"y{lower}"},
        **axis.layout,
        "domain": [column * (width + 0.09), column * (width + 0.09) + width],
    }
    layout[f"yaxis{upper}"] = {"title": {"text": "tokens per second"}, "range": [0, HEADROOM * most], "domain": UPPER}
    layout[f"yaxis{lower}"] = {
        "title": {"text": "recall"}, "range": [0, 104], "domain": LOWER, "ticksuffix": " %", "dtick": 25,
    }  # fmt: skip
    for number in (upper, lower):
        layout[f"yaxis{number}"] |= {"zeroline": False, "anchor": f"x{x}"}
    layout["hoversubplots"] = "axis"
    return data


def _break_even_line(points: Sequence[Point], axis: Axis, drawn: NDArray[np.float64]) -> dict[str, Any]:
    trace = line("break-even", axis.values, drawn, GREY, marker="circle")
    cases = [point["break_even"]["pays"] for point in points]
    trace["marker"] |= {"symbol": [SYMBOLS[case] for case in cases], "size": 8}
    said = {"always": "even blind guesses are no slower", "never": "not even perfect guesses are faster"}
    trace["customdata"] = [said.get(case, f"{value:.1f} %") for case, value in zip(cases, drawn, strict=True)]
    return trace | {"hovertemplate": "%{customdata}"}


def _drawn(simulation: Simulation) -> str | None:
    """Return the predictor that was swept, the best of them."""
    return next((name for name in predictor_names(simulation) if name in simulation["sweep"]["policies"]), None)


def _recall(simulation: Simulation, name: str | None) -> float | None:
    """Return a predictor's recall where it names K experts, as those do that break-even was found with."""
    if name is None or simulation["prefetchers"][name]["budget"] != simulation["model_profile"]["top_k"]:
        return None
    return float(simulation["prefetchers"][name]["recall"])


def _per_cent(recall: float | None) -> float | None:
    return None if recall is None else round(100 * recall, 1)
