"""Figures of a simulation's rows: tokens per second with where their time goes, and what became of the bytes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.figures import Colours, Figure, dots, label, line, line_layout, rounded, shortened
from analysis.simulations import (
    GREY,
    HOVER,
    Row,
    Simulation,
    alike,
    best_row,
    caching_row,
    per_cents,
    predictor_names,
    row_name,
    spoken,
    style,
)
from analysis.tokens import readable

Part = tuple[str, str, Colours]  # name, counter, colours
TIME: tuple[Part, ...] = (
    ("attention", "attention_ns", ("#0b4a80", "#9fd0f7")),
    ("experts", "experts_ns", ("#4c8fc4", "#4a94d0")),
    ("rest", "other_ns", ("#b5cfe4", "#2b577d")),
    ("waiting for experts", "waiting_ns", ("#d55e00", "#f58b3c")),
)
MOVED: tuple[Part, ...] = (
    ("demanded", "demanded", ("#868d95", "#7f868e")),
    ("useful", "useful", ("#009e73", "#2fc79a")),
    ("late", "late", ("#e0a52e", "#d9b23f")),
    ("wasted", "wasted", ("#a5508a", "#dd92c2")),
    ("left at the end", "unused", ("#cfb9cb", "#6b4a61")),
)
GROUP_GAP = 0.7  # of a row, between prefetchers
ROW_HEIGHT = 26  # px


def speed_figure(simulation: Simulation) -> Figure:
    """Dots of tokens per second with intervals, and beside them stacked bars of a token's milliseconds."""
    rows, ys = simulation["rows"], positions(simulation["rows"])
    data: list[dict[str, Any]] = []
    for prefetcher in dict.fromkeys(row["prefetcher"] for row in rows):
        own = [place for place, row in enumerate(rows) if row["prefetcher"] == prefetcher]
        speeds = [rows[place]["tokens_per_s"] for place in own]
        ends = [np.array([speed[end] for speed in speeds]) for end in ("value", "low", "high")]
        look = style(simulation, prefetcher)
        data.append(
            dots(prefetcher, [], ends, look.colours, look.marker, "tokens/s")
            | {
                "y": [ys[place] for place in own],
                "text": [label(row_name(rows[place])) for place in own],
                "hovertemplate": HOVER,
                "showlegend": False,
            }
        )
    most = float(simulation["machine"]["tokens_per_s_with_all_experts"])
    edge = np.array([ys[0] - 0.6, ys[-1] + 0.6])
    data.append(
        line("all experts on the GPU", [most, most], edge, GREY, dash="dot")
        | {"hovertemplate": "%{x:.2f} tokens/s<extra></extra>"}
    )
    milliseconds = {name: [per_token(row, counter) / 1e6 for row in rows] for name, counter, _ in TIME}
    data += [bars(name, milliseconds[name], rows, ys, colours, "ms") | {"xaxis": "x2"} for name, _, colours in TIME]
    layout = rows_layout(rows, ys)
    layout["xaxis"] |= {"title": {"text": "tokens per second"}, "domain": [0, 0.5], "rangemode": "tozero"}
    layout["xaxis2"] = layout["xaxis"] | {"title": {"text": "milliseconds per token"}, "domain": [0.55, 1]}
    speeds, gains = [row["tokens_per_s"] for row in rows], [row["over_caching"] for row in rows]
    return Figure(
        key="prefetching_speed",
        title="Tokens per second, and where the time goes",
        sentence=_speed_words(simulation, most),
        spec={"data": data, "layout": layout},
        columns=["prefetcher", "policy", "tokens per second", "95 % from", "to", "times as fast as caching",
                 "95 % from", "to", *(f"{name}, ms per token" for name in milliseconds), "hit rate, %"],
        rows=[
            [readable(row["prefetcher"]), readable(row["policy"]), *cells]
            for row, *cells in zip(
                rows,
                *(alike([speed[end] for speed in speeds]) for end in ("value", "low", "high")),
                *([round(gain[end], 3) for gain in gains] for end in ("value", "low", "high")),
                *map(alike, milliseconds.values()),
                [round(100 * row["hit_rate"]["value"], 2) for row in rows],
                strict=True,
            )
        ],
        min_width=640,
    )  # fmt: skip


def bytes_figure(simulation: Simulation) -> Figure:
    """Stacked bars of the megabytes that cross the link per token, by what became of them."""
    rows, ys = simulation["rows"], positions(simulation["rows"])
    moved = {
        name: [per_token(row, counter) * row["totals"]["expert_bytes"] / 1e6 for row in rows]
        for name, counter, _ in MOVED
    }
    layout = rows_layout(rows, ys)
    layout["xaxis"] |= {"title": {"text": "MB over the link, per token"}}
    whole = [sum(parts) for parts in zip(*moved.values(), strict=True)]
    return Figure(
        key="prefetching_bytes",
        title="What becomes of the bytes",
        sentence=_bytes_words(simulation),
        spec={
            "data": [bars(name, moved[name], rows, ys, colours, "MB") for name, _, colours in MOVED],
            "layout": layout,
        },
        columns=["prefetcher", "policy", *(f"{name}, MB per token" for name in moved), "together, MB per token",
                 "prefetches per token", "of them useful, %", "late, %", "cancelled before they began, per token",
                 "held back for what is needed sooner, times per token"],
        rows=[
            [readable(row["prefetcher"]), readable(row["policy"]), *cells]
            for row, *cells in zip(
                rows,
                *map(alike, moved.values()),
                alike(whole),
                alike([per_token(row, "prefetched") for row in rows]),
                *([_share(row[f"{which}_share"]) for row in rows] for which in ("useful", "late")),
                *(alike([per_token(row, counter) for row in rows]) for counter in ("cancelled", "held_back")),
                strict=True,
            )
        ],
        max_width=900,
    )  # fmt: skip


def per_token(row: Row, counter: str) -> float:
    """Return a counter of the row's totals per token."""
    return float(row["totals"][counter] / row["totals"]["tokens"])


def positions(rows: Sequence[Row]) -> list[float]:
    """Return where each row stands, from the top down, with a gap between prefetchers."""
    places, at = [0.0], 0.0
    for before, row in pairwise(rows):
        at += 1 + GROUP_GAP * (before["prefetcher"] != row["prefetcher"])
        places.append(round(at, 3))
    return places


def bars(
    name: str, values: Sequence[float], rows: Sequence[Row], ys: Sequence[float], colours: Colours, unit: str
) -> dict[str, Any]:
    """Return one part of stacked bars, a bar for every row."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": label(name),
        "x": rounded(np.array(values), 6),
        "y": list(ys),
        "width": 0.72,
        "text": [label(row_name(row)) for row in rows],
        "textposition": "none",
        "hovertemplate": f"%{{text}}<br>{label(name)}: %{{x:.3~f}} {unit}<extra></extra>",
        "marker": {"color": colours[0], "line": {"width": 0}},
        "meta": {"dark": {"marker.color": colours[1]}},
    }


def rows_layout(rows: Sequence[Row], ys: Sequence[float]) -> dict[str, Any]:
    """Return the layout of figures with a line for every row, named at the left."""
    layout = line_layout("", "", height=round(100 + ROW_HEIGHT * (ys[-1] + 1)))
    layout |= {"hovermode": "closest", "barmode": "stack"}
    layout["legend"] |= {"traceorder": "normal"}
    layout["xaxis"] |= {"showgrid": True}
    layout["yaxis"] |= {
        "tickvals": list(ys),
        "ticktext": [label(shortened(row_name(row), 34)) for row in rows],
        "range": [ys[-1] + 0.7, ys[0] - 0.7],
        "showgrid": False,
        "automargin": True,
    }
    return layout


def _speed_words(simulation: Simulation, most: float) -> str:
    caching, predicted = caching_row(simulation), best_row(simulation, predictor_names(simulation))
    words = (
        "Each dot is a prefetcher with a policy of eviction, its bar the 95 % interval over sequences; at the right "
        "stands the time of a mean token, of which prefetching can save the waiting."
    )
    if not caching["totals"]["waiting_ns"]:
        return f"{words} Nothing waits here: caching alone makes {_rate(caching)} tokens a second, all that can be had."
    words += f" Caching alone reaches {_rate(caching)} tokens a second at best ({readable(caching['policy'])})"
    if predicted is not None:
        saved = [spoken(per_token(row, "waiting_ns") / 1e6) for row in (caching, predicted)]
        words += (
            f", {readable(predicted['prefetcher'])} {_rate(predicted)} ({readable(predicted['policy'])}), which waits "
            f"{saved[1]} ms for a token in place of {saved[0]}"
        )
    return f"{words}; a GPU that held all experts would reach {spoken(most)}."


def _bytes_words(simulation: Simulation) -> str:
    caching = caching_row(simulation)
    best = best_row(simulation, predictor_names(simulation)) or best_row(simulation, ["perfect"])
    words = "Every expert that crosses the link was demanded, by a layer that waits for it, or prefetched."
    if best is None or best["useful_share"] is None:
        return f"{words} Nothing was prefetched here: all guesses were there already, unlikely, or too late to begin."
    useful, late = best["useful_share"]["value"], best["late_share"]["value"]
    moved = [spoken(row["bytes_per_token"]["value"] / 1e6) for row in (caching, best)]
    return per_cents(
        f"{words} Of the prefetches of {row_name(best)}, {useful:.1%} are there in time, {late:.1%} are still on their "
        f"way when the layer needs them, which shortens the wait, and {1 - useful - late:.1%} are not used; it moves "
        f"{moved[1]} MB for a token, caching alone {moved[0]}."
    )


def _rate(row: Row) -> str:
    return spoken(row["tokens_per_s"]["value"])


def _share(share: dict[str, float] | None) -> float | None:
    return None if share is None else round(100 * share["value"], 2)
