"""Figure of several simulations: what caching, prediction and foresight reach on each machine."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.figures import SERIES, Figure, dots, label, line_layout, shortened
from analysis.simulations import (
    HOVER,
    REFERENCES,
    Row,
    Simulation,
    Style,
    alike,
    best_row,
    caching_row,
    predictor_names,
    row_name,
    times,
)
from analysis.tokens import readable

PREDICTED = Style(SERIES[0], "circle", "solid")
ROW_HEIGHT = 44  # px


def machines_figure(simulations: Sequence[Simulation]) -> Figure:
    """Dots of tokens per second by simulation: the best caching, the best predictor, perfect guesses, the oracle."""
    found = [_contestants(simulation) for simulation in simulations]
    names = _machines(simulations)
    data = []
    for kind, look in (("none", REFERENCES["none"]), ("predictor", PREDICTED), ("perfect", REFERENCES["perfect"]),
                       ("oracle", REFERENCES["oracle"])):  # fmt: skip
        known = [(place, each[kind]) for place, each in enumerate(found) if kind in each]
        ends = [np.array([row["tokens_per_s"][end] for _, row in known]) for end in ("value", "low", "high")]
        data.append(
            dots("best predictor" if kind == "predictor" else kind, [], ends, look.colours, look.marker, "tokens/s")
            | {
                "y": [place for place, _ in known],
                "text": [f"{label(names[place])}<br>{label(row_name(row))}" for place, row in known],
                "hovertemplate": HOVER,
            }
        )
    layout = line_layout("tokens per second, on a logarithmic scale", "", height=110 + ROW_HEIGHT * len(names)) | {
        "hovermode": "closest"
    }
    speeds = [row["tokens_per_s"][end] for each in found for row in each.values() for end in ("low", "high")]
    ticks = [step * 10.0**power for power in range(-3, 9) for step in (1, 2, 5)]  # plotly's own are in small print
    ticks = [tick for tick in ticks if min(speeds) / 2 <= tick <= 2 * max(speeds)]
    layout["xaxis"] |= {"showgrid": True, "type": "log", "tickvals": ticks, "tickformat": ".3~g"}
    layout["yaxis"] |= {
        "tickvals": list(range(len(names))),
        "ticktext": [label(shortened(name, 44)) for name in names],
        "range": [len(names) - 0.4, -0.6],
        "showgrid": False,
        "automargin": True,
    }
    return Figure(
        key="prefetching_machines",
        title="The simulations compared",
        sentence=_words(found, names),
        spec={"data": [trace for trace in data if trace["x"]], "layout": layout},
        columns=["machine", "experts on the GPU, %", "caching", "tokens/s", "predictor", "tokens/s", "times as fast",
                 "95 % from", "to", "perfect, tokens/s", "oracle, tokens/s", "with all experts, tokens/s"],
        rows=_table(simulations, found, names),
    )  # fmt: skip


def _contestants(simulation: Simulation) -> dict[str, Row]:
    rows = {
        "none": caching_row(simulation),
        "predictor": best_row(simulation, predictor_names(simulation)),
        "perfect": best_row(simulation, ["perfect"]),
        "oracle": best_row(simulation, ["oracle"]),
    }
    return {kind: row for kind, row in rows.items() if row is not None}


def _machines(simulations: Sequence[Simulation]) -> list[str]:
    """Return a name for each simulation; those of one machine and set-up are numbered."""
    names: list[str] = []
    for simulation in simulations:
        machine = simulation["machine"]
        held = machine["cache_experts"] / machine["experts"]
        name = f"{readable(simulation['hardware']['name'])}, {readable(machine['precision'])}, {100 * held:.0f} %"
        before = sum(each == name or each.startswith(f"{name} (") for each in names)
        names.append(f"{name} ({before + 1})" if before else name)
    return names


def _table(simulations: Sequence[Simulation], found: Sequence[dict[str, Row]], names: Sequence[str]) -> list[list[Any]]:
    speeds = {
        kind: alike([rows[kind]["tokens_per_s"]["value"] if kind in rows else 0.0 for rows in found])
        for kind in ("none", "predictor", "perfect", "oracle")
    }
    table: list[list[Any]] = []
    for place, (simulation, rows) in enumerate(zip(simulations, found, strict=True)):
        machine, predicted = simulation["machine"], rows.get("predictor")
        own: list[Any] = [None] * 5
        if predicted is not None:
            gain = predicted["over_caching"]
            own = [row_name(predicted), speeds["predictor"][place],
                   *(round(gain[end], 3) for end in ("value", "low", "high"))]  # fmt: skip
        table.append(
            [names[place], round(100 * machine["cache_experts"] / machine["experts"], 2),
             readable(rows["none"]["policy"]), speeds["none"][place], *own,
             *(speeds[kind][place] if kind in rows else None for kind in ("perfect", "oracle")),
             alike([machine["tokens_per_s_with_all_experts"]])[0]]
        )  # fmt: skip
    return table


def _words(found: Sequence[dict[str, Row]], names: Sequence[str]) -> str:
    words = (
        f"What each of {len(names)} set-ups reaches, with the share of experts that its GPU holds: caching alone, the "
        "best predictor, perfect guesses as far ahead, and the oracle"
    )
    gains = [(rows["predictor"]["over_caching"], name) for rows, name in zip(found, names, strict=True)
             if "predictor" in rows]  # fmt: skip
    if gains:
        (most, where), (least, elsewhere) = (
            choose(gains, key=lambda each: float(each[0]["value"])) for choose in (max, min)
        )
        words += f". A predictor buys most on {where}, {times(most)} the speed of caching alone"
        words += f", and least on {elsewhere}, {times(least)}" if elsewhere != where else ""
    return f"{words}."
