"""The answer in plain words: what limits this set-up, what the predictor changes, and what would change more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefetch.rows import Row
from prefetch.simulation import Prefetcher, Simulation
from prefetch.timing import Timing

MANY = 0.1  # of the predictions: fewer that come too late are not worth a word
SAME = 1.005  # times as fast: what is not above it is no gain
NOTHING_TO_FETCH = "So there is nothing to prefetch, and no predictor can change anything."
WORTH_IT = 1.05  # times as fast as caching alone, the interval's lower end: less is called small


@dataclass(frozen=True)
class Change:
    """Something else that one could do, and how many times as many tokens a second it makes."""

    what: str
    times: float
    possible: bool
    """False for what only tells how far one could get: it needs to know the future."""


def what_else(
    simulation: Simulation,
    policy: str,
    prefetcher: Prefetcher | None,
    others: Sequence[Prefetcher],
    perfect: Prefetcher,
    oracle: Prefetcher,
) -> list[Change]:
    """Simulate other ways to be faster than this policy with this prefetcher; the best comes first.

    `others` are the same prefetcher at other horizons.
    """
    shape = simulation.workload.shape
    everything = shape.num_layers * shape.num_experts
    now = simulation.run(policy, prefetcher).tokens_per_s
    doubled, ram = simulation.changed(capacity=min(everything, 2 * simulation.capacity)), simulation.ram_experts
    smaller = doubled.changed(timing=halved(simulation.timing), ram_experts=None if ram is None else 2 * ram)
    ways: dict[str, float] = {
        "a link twice as fast": _speed(simulation.changed(timing=simulation.timing.with_link(2)), policy, prefetcher),
        "experts of half the bytes": _speed(smaller, policy, prefetcher),
    }
    limits: dict[str, float] = {
        "the best possible eviction (belady)": _speed(simulation, "belady", prefetcher),
        f"perfect predictions {_layers(perfect.horizon)} ahead": _speed(simulation, policy, perfect),
        "perfect foresight of a whole token under belady": _speed(simulation, "belady", oracle),
    }
    if doubled.capacity > simulation.capacity:
        ways["room for twice as many experts" if doubled.capacity < everything else "room for all experts"] = _speed(
            doubled, policy, prefetcher
        )
    if ram is not None:
        ways["RAM for all experts"] = _speed(simulation.changed(ram_experts=None), policy, prefetcher)
    ways |= {f"predictions {_layers(each.horizon)} ahead": _speed(simulation, policy, each) for each in others}
    if prefetcher is not None and prefetcher.predict_ns:
        ways["predictions that take no time"] = _speed(simulation, policy, replace(prefetcher, predict_ns=0))
    found = [
        Change(what, speed / now, possible)
        for each, possible in ((ways, True), (limits, False))
        for what, speed in each.items()
    ]
    return sorted(found, key=lambda each: -each.times)


def halved(timing: Timing) -> Timing:
    """Return the same with experts of half the bytes, which take half as long to move and to run."""
    return replace(
        timing,
        expert_bytes=timing.expert_bytes // 2,
        transfer_ns=timing.transfer_ns // 2,
        read_ns=timing.read_ns // 2,
        experts_ns_AE=timing.experts_ns_AE // 2,
    )


def sentences(
    simulation: Simulation, caching: Row, predicted: Row | None, evicting: Row | None, perfect: Row,
    recall: Mapping[str, float], changes: list[Change],
) -> list[str]:  # fmt: skip
    """Return three sentences about a table.

    `caching` is the best row without prefetching that could be built, `predicted` the best with a predictor (None where
    none was given), `evicting` the row that only evicts as that one does (None where it was not simulated), `perfect`
    that of perfect predictions at the same horizon.
    """
    return [
        _limits(simulation, caching),
        _predictor(caching, predicted, evicting, perfect, recall)
        if caching.outcome.totals["demanded"]
        else NOTHING_TO_FETCH,
        _more(changes, "caching alone" if predicted is None else f"prefetching with {predicted.prefetcher}"),
    ]


def _limits(simulation: Simulation, row: Row) -> str:
    totals = row.outcome.totals
    total_ns = row.outcome.total_ns
    token_ms = total_ns / totals["tokens"] / 1e6
    waiting = totals["waiting_ns"] / total_ns
    shape = simulation.workload.shape
    held = simulation.capacity / (shape.num_layers * shape.num_experts)
    if not totals["demanded"]:
        return (
            f"Nothing is fetched while decoding, because the GPU holds {held:.0%} of the experts: a token takes "
            f"{token_ms:.2f} ms, all of it computing."
        )
    slow = "the disk" if totals["disk_ns"] > totals["link_ns"] else "the link"
    limit = slow if waiting > 0.5 else f"computing, and {slow} next" if waiting > 0.1 else "computing"
    return (
        f"What limits this set-up is {limit}: with the best caching ({row.policy}) and no prefetching, {waiting:.0%} "
        f"of the {token_ms:.2f} ms of a token are spent waiting for experts, of which the GPU holds {held:.0%}, and "
        f"{1 - row.outcome.hit_rate:.1%} of the experts needed are not there."
    )


def _predictor(
    caching: Row, predicted: Row | None, evicting: Row | None, perfect: Row, recall: Mapping[str, float]
) -> str:
    best = perfect.faster_than(caching)["value"]
    if predicted is None:
        return (
            f"No predictor was given; perfect predictions as far ahead would be {best:.2f} times as fast as caching "
            f"alone, about the most that a predictor can add to {perfect.policy}."
        )
    gain = predicted.faster_than(caching)
    spoken = f"{gain['value']:.3f} times [{gain['low']:.3f}, {gain['high']:.3f}] as fast as {caching.policy} alone"
    if evicting is not None and evicting.policy == "guided":
        spoken += f" ({evicting.faster_than(caching)['value']:.3f} by its evictions alone)"
    verdict = (
        "it is worth it" if gain["low"] >= WORTH_IT
        else "a small gain" if gain["low"] > 1
        else "not worth it" if gain["high"] >= 1
        else "it does harm"
    )  # fmt: skip
    totals = predicted.outcome.totals
    skipped = totals["skipped"] / max(1, totals["skipped"] + totals["predicted"])
    so = "although" if gain["low"] >= WORTH_IT else "for"
    late = f", {so} {skipped:.0%} of its predictions come too late" if skipped > MANY else ""
    return (
        f"Prefetching with {predicted.prefetcher} (recall {recall[predicted.prefetcher]:.3f}, {predicted.policy}) is "
        f"{spoken}: {verdict}{late}; perfect predictions as far ahead would be {best:.2f} times as fast."
    )


def _more(changes: list[Change], now: str) -> str:
    better = [each for each in changes if each.times > SAME]
    if not better:
        return "Nothing that was tried would be faster: neither memory nor link, eviction nor prediction."
    ways, limits = ([each for each in better if each.possible is possible] for possible in (True, False))
    listed = [f"{each.what} {each.times:.2f}" for each in ways]
    useless = [each.what for each in changes if each.possible and each.times <= SAME]
    return (
        f"What would add to {now}, in times its tokens per second: {', '.join(listed) or 'nothing'}"
        + (f"; no gain from {', '.join(useless)}" if useless else "")
        + (f"; at the limit, {', '.join(f'{each.what} {each.times:.2f}' for each in limits)}" if limits else "")
        + "."
    )


def _layers(count: int) -> str:
    return "one layer" if count == 1 else f"{count} layers"


def _speed(simulation: Simulation, policy: str, prefetcher: Prefetcher | None) -> float:
    return simulation.run(policy, prefetcher).tokens_per_s


def as_json(changes: list[Change]) -> list[dict[str, Any]]:
    return [{"what": each.what, "times_as_fast": each.times, "possible": each.possible} for each in changes]
