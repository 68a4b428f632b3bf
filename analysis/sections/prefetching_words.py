"""Words of a sweep: where prefetching buys most and least, and from which recall it pays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.figures import listed
from analysis.tokens import readable

Point = Mapping[str, Any]  # of a sweep: tokens per second by prefetcher, and the recall that breaks even
CASES = {"always": "even blind guesses are no slower", "never": "not even perfect ones are faster"}
NO_CHANGE = 0.005  # of the speed: less is called none


@dataclass(frozen=True)
class Axis:
    """What is varied: its title, where each point and the simulated set-up stand, and how to say where one is."""

    title: str
    values: list[float]
    at: float
    said: Callable[[float], str]
    layout: Mapping[str, Any]


def gain_words(points: Sequence[Point], name: str, axis: Axis) -> str:
    """Return where a prefetcher changes most and least, and where it does harm."""
    ratios = [point["tokens_per_s"][name] / point["tokens_per_s"]["none"] for point in points]
    most, least = int(np.argmax(ratios)), int(np.argmin(ratios))
    if max(abs(ratio - 1) for ratio in ratios) < NO_CHANGE:
        return f"{readable(name)} is as fast as caching alone at all of them"
    harm = ": it does harm there" if ratios[least] < 1 - NO_CHANGE else ""
    return (
        f"{readable(name)} buys most {axis.said(axis.values[most])}, {ratios[most]:.2f} times the speed of caching "
        f"alone, and least {axis.said(axis.values[least])}, {ratios[least]:.2f} times{harm}"
    )


def break_even_words(
    points: Sequence[Point], axis: Axis, recall: float | None, name: str, *, threshold: float = 0.0
) -> str:
    """Return where prefetching pays, by the recall that breaks even and that of the predictor drawn.

    `threshold` is the least probability of what the predictor fetches.
    """
    cases: dict[str, list[float]] = {case: [] for case in ("above", *CASES)}
    for point, value in zip(points, axis.values, strict=True):
        cases[point["break_even"]["pays"]].append(value)
    above = sorted(
        (point["break_even"]["recall"], value)
        for point, value in zip(points, axis.values, strict=True)
        if point["break_even"]["pays"] == "above"
    )
    words = []
    if above:
        (low, easiest), (high, hardest) = above[0], above[-1]
        words.append(
            f"a recall of {100 * low:.0f} % is enough {axis.said(easiest)}"
            + (f", {100 * high:.0f} % is needed {axis.said(hardest)}" if len(above) > 1 else "")
        )
    for case, meaning in CASES.items():
        where = "everywhere" if len(cases[case]) == len(points) else listed([axis.said(each) for each in cases[case]])
        words += [f"{where} {meaning}"] * bool(cases[case])
    told = "; ".join(words)
    if recall is None:
        return f"{told}."
    clears = [pays(point, recall) for point in points]
    told += (
        f". The recall of {readable(name)}, {100 * recall:.1f} %, clears it at {sum(clears)} of {len(points)} points"
    )
    itself = [point["tokens_per_s"][name] / point["tokens_per_s"]["none"] - 1 for point in points]
    if any(abs(gain) > NO_CHANGE and (gain > 0) != clear for gain, clear in zip(itself, clears, strict=True)):
        told += "; where its own curve above says otherwise, that counts: its mistakes are not spread evenly"
        told += ", and it fetches only what it is sure enough of" if threshold else ""
    return f"{told}."


def pays(point: Point, recall: float) -> bool:
    """Return whether guesses of this recall are no slower than none at a point of a sweep."""
    least = point["break_even"]
    return least["pays"] == "always" or (least["pays"] == "above" and recall >= float(least["recall"]))
