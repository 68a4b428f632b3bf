"""The answer in plain words: what limits this set-up, what the predictor changes, and what would change more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefetch.rows import Row
from prefetch.simulation import Prefetcher, Simulation
from prefetch.timing import Timing

WORTH_IT = 1.05  # times as fast as caching alone, the interval's lower end: less is called small


@dataclass(frozen=True)
class Change:
    """Something else that one could do, and how many times as many tokens a second it makes."""

    what: str
    times: float


def what_else(
    simulation: Simulation, policy: str, prefetcher: Prefetcher | None, perfect: Prefetcher, oracle: Prefetcher
) -> list[Change]:
    """Simulate other ways to be faster than this policy with this prefetcher; the best comes first."""
    shape = simulation.workload.shape
    everything = shape.num_layers * shape.num_experts
    now = simulation.run(policy, prefetcher).tokens_per_s
    doubled = simulation.changed(capacity=min(everything, 2 * simulation.capacity))
    layers = "one layer" if perfect.horizon == 1 else f"{perfect.horizon} layers"
    ways: dict[str, float] = {
        "a link twice as fast": _speed(simulation.changed(timing=simulation.timing.with_link(2)), policy, prefetcher),
        "experts of half the bytes": _speed(doubled.changed(timing=halved(simulation.timing)), policy, prefetcher),
        "the best possible eviction (belady)": _speed(simulation, "belady", prefetcher),
        f"perfect predictions {layers} ahead": _speed(simulation, policy, perfect),
        "perfect foresight of a whole token, with the best possible eviction": _speed(simulation, "belady", oracle),
    }
    if doubled.capacity > simulation.capacity:
        ways["room for twice as many experts" if doubled.capacity < everything else "room for all experts"] = _speed(
            doubled, policy, prefetcher
        )
    if prefetcher is not None and prefetcher.predict_ns:
        ways["predictions that take no time"] = _speed(simulation, policy, replace(prefetcher, predict_ns=0))
    return sorted((Change(what, speed / now) for what, speed in ways.items()), key=lambda each: -each.times)


def halved(timing: Timing) -> Timing:
    """Return the same with experts of half the bytes, at the same latency of a transfer."""
    return replace(
        timing,
        expert_bytes=timing.expert_bytes // 2,
        transfer_ns=timing.transfer_ns // 2,
        read_ns=timing.read_ns // 2,
        experts_ns_AE=timing.experts_ns_AE // 2,
    )


def sentences(
    simulation: Simulation, caching: Row, predicted: Row | None, perfect: Row, recall: Mapping[str, float],
    changes: list[Change],
) -> list[str]:  # fmt: skip
    """Return three sentences about a table.

    `caching` is the best row without prefetching that could be built, `predicted` the best with a predictor (None where
    none was given), `perfect` that of perfect predictions at the same horizon.
    """
    return [
        _limits(simulation, caching),
        _predictor(caching, predicted, perfect, recall),
        _more(changes, "this" if predicted is None else f"prefetching with {predicted.prefetcher}"),
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


def _predictor(caching: Row, predicted: Row | None, perfect: Row, recall: Mapping[str, float]) -> str:
    best = perfect.faster_than(caching)["value"]
    if predicted is None:
        return (
            f"No predictor was given; perfect predictions as far ahead would be {best:.2f} times as fast as caching "
            "alone, which is what a predictor is worth here at most."
        )
    gain = predicted.faster_than(caching)
    spoken = f"{gain['value']:.3f} times [{gain['low']:.3f}, {gain['high']:.3f}] as fast as {caching.policy} alone"
    verdict = (
        "it is worth it" if gain["low"] >= WORTH_IT
        else "a small gain" if gain["low"] > 1
        else "not worth it" if gain["high"] >= 1
        else "it does harm"
    )  # fmt: skip
    return (
        f"Prefetching with {predicted.prefetcher} (recall {recall[predicted.prefetcher]:.3f}, {predicted.policy}) is "
        f"{spoken}: {verdict}; perfect predictions as far ahead would be {best:.2f} times as fast."
    )


def _more(changes: list[Change], now: str) -> str:
    better = [each for each in changes if each.times > 1.005]
    if not better:
        return "Nothing that was tried would change more: neither memory nor link, eviction nor prediction."
    listed = "; ".join(f"{each.what}: {each.times:.2f} times" for each in better[:4])
    least = [each for each in changes if each.times <= 1.005]
    rest = f"; no gain from {', '.join(each.what for each in least)}" if least else ""
    return f"What would change more than {now}, in times its tokens per second: {listed}{rest}."


def _speed(simulation: Simulation, policy: str, prefetcher: Prefetcher | None) -> float:
    return simulation.run(policy, prefetcher).tokens_per_s


def as_json(changes: list[Change]) -> list[dict[str, Any]]:
    return [{"what": each.what, "times_as_fast": each.times} for each in changes]
