"""Simulations as the section on prefetching reads them: checked, with the rows that sentences name, each in its style.

A simulation may come from a file that anyone wrote, so everything about it is doubted.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from analysis.evaluations import MARKERS, doubted
from analysis.figures import SERIES, Colours
from analysis.tokens import readable
from groundwork.errors import ConfigurationError
from prefetch.contest import FOREKNOWING
from prefetch.simulate import FORMAT_VERSION
from traces.schema import TraceSpec

Simulation = Mapping[str, Any]
Row = Mapping[str, Any]

UNNAMED = "the simulation"
VERB = "simulate"  # what writes it
HOVER = "%{text}<br>%{x:.2f} tokens/s  [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<extra></extra>"  # of a row's dot
GREY: Colours = ("#5b6169", "#b3b8be")


class Style(NamedTuple):
    """How a prefetcher looks in every figure."""

    colours: Colours
    marker: str
    dash: str


REFERENCES = {
    "none": Style(GREY, "diamond", "solid"),
    "perfect": Style(SERIES[2], "square-open", "dash"),
    "oracle": Style(SERIES[3], "triangle-up-open", "dot"),
}


def checked(simulations: Sequence[Simulation], spec: TraceSpec, names: Sequence[str] = ()) -> list[Simulation]:
    """Return the simulations; `names` are what errors call them, such as their files.

    Raises ConfigurationError where one is none, or is of another version or shape of model.
    """
    for name, simulation in zip(names or [UNNAMED] * len(simulations), simulations, strict=True):
        with doubted(name, VERB):
            json.dumps(simulation, allow_nan=False)
            shape = simulation["model_profile"]
            for key, found, wanted in (
                ("format_version", simulation["format_version"], FORMAT_VERSION),
                ("num_layers", shape["moe_layers"], spec.num_layers),
                ("num_experts", shape["num_experts"], spec.num_experts),
                ("top_k", shape["top_k"], spec.top_k),
            ):
                if found != wanted:
                    raise ConfigurationError(
                        f"{name} has {key} {found!r}, but {wanted} is needed here; "
                        + ("write it anew" if key == "format_version" else "simulate with traces of the same model")
                    )
    return list(simulations)


def predictor_names(simulation: Simulation) -> list[str]:
    """Return the predictors that were simulated, in the order given."""
    return [name for name in simulation["prefetchers"] if name not in REFERENCES]


def style(simulation: Simulation, prefetcher: str) -> Style:
    """Return how a prefetcher looks: predictors coloured, what they are compared with in colours of its own."""
    if prefetcher in REFERENCES:
        return REFERENCES[prefetcher]
    place = predictor_names(simulation).index(prefetcher)
    return Style(SERIES[place % 2], MARKERS[place % len(MARKERS)], "solid")


def caching_row(simulation: Simulation) -> Row:
    """Return the row of the best caching without prefetching."""
    wanted = ("none", simulation["best_caching"])
    found: list[Row] = [row for row in simulation["rows"] if (row["prefetcher"], row["policy"]) == wanted]
    return found[0]


def best_row(simulation: Simulation, prefetchers: Sequence[str]) -> Row | None:
    """Return the fastest row of these prefetchers, under a policy that a machine can have where there is one."""
    own = [row for row in simulation["rows"] if row["prefetcher"] in prefetchers]
    real = [row for row in own if row["policy"] != FOREKNOWING]
    return max(real or own, key=lambda row: float(row["tokens_per_s"]["value"]), default=None)


def row_name(row: Row) -> str:
    """Return a row's prefetcher with its policy, not yet escaped."""
    return f"{readable(row['prefetcher'])} · {readable(row['policy'])}"


def decimals(values: Sequence[float]) -> int:
    """Return how many decimals show four significant digits of the largest of these numbers."""
    most = max((abs(value) for value in values), default=0.0)
    return max(0, 3 - math.floor(math.log10(most))) if most else 0


def alike(values: Sequence[float]) -> list[float]:
    """Return numbers rounded to the same decimals, four significant digits of the largest."""
    digits = decimals(values)
    return [round(value, digits) for value in values]


def spoken(value: float) -> str:
    """Return a number with three significant digits, as a sentence has it."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def times(ratio: Mapping[str, float]) -> str:
    """Return how many times as fast, with the interval, as a sentence has it."""
    return f"{ratio['value']:.3f} times ({ratio['low']:.3f} to {ratio['high']:.3f})"


def per_cents(sentence: str) -> str:
    """Return a sentence with a blank before each `%` of a number, as the page's others have it."""
    return re.sub(r"(?<=\d)%", " %", sentence)
