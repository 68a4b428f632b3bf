"""How the answer changes with the size of the cache and the speed of the link, and how good a guess must be to pay.

Break-even is the recall at which prefetching is as fast as none: found with made-up prefetchers of every accuracy
between blind and perfect (`guesses.GradedGuesses`), at the same cost of prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from groundwork.progress import Progress, progress
from prefetch.guesses import GradedGuesses
from prefetch.simulation import Prefetcher, Simulation

CACHE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
LINK_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
BISECTIONS = 6  # recall to within 1/64 of the way from blind to perfect


Contestant = tuple[str, Prefetcher | None]  # the policy of eviction that goes with it


def sweep(
    simulation: Simulation, contestants: Mapping[str, Contestant], graded: tuple[str, Prefetcher], seed: int
) -> dict[str, Any]:
    """Return tokens per second of every contestant at other cache sizes and links, and the recall that breaks even.

    One of them is `none`, which break-even is measured against; `graded` has the policy, horizon, budget and cost of
    prediction of the made-up prefetchers.
    """
    shape = simulation.workload.shape
    everything = shape.num_layers * shape.num_experts
    shares = {max(simulation.least_capacity, round(share * everything)) for share in CACHE_SHARES}
    sizes = sorted(shares | {simulation.capacity})
    source = GradedGuesses(simulation.workload, seed)
    bar: Progress[None] = progress(total=len(sizes) + len(LINK_FACTORS), description="sweeping", unit="point")

    def point(changed: Simulation) -> dict[str, Any]:
        speeds = {name: changed.run(*each).tokens_per_s for name, each in contestants.items()}
        bar.update(1)
        return {"tokens_per_s": speeds, "break_even": break_even(changed, graded, source, speeds["none"])}

    with bar:
        by_cache = [
            {"cache_experts": size, "share": size / everything, **point(simulation.changed(capacity=size))}
            for size in sizes
        ]
        by_link = [
            {"link_factor": factor, **point(simulation.changed(timing=simulation.timing.with_link(factor)))}
            for factor in LINK_FACTORS
        ]
    return {
        "policies": {name: policy for name, (policy, _) in contestants.items()},
        "break_even_policy": graded[0],
        "sequences": len(simulation.workload.lengths_S),
        "tokens": int(simulation.workload.lengths_S.sum()),
        "by_cache": by_cache,
        "by_link": by_link,
    }


def break_even(
    simulation: Simulation, graded: tuple[str, Prefetcher], source: GradedGuesses, without: float
) -> dict[str, Any]:
    """Return the least recall that is as fast as `without` tokens per second, and which case it is.

    `pays` is `never` where even perfect guesses are no faster (then recall is None), `always` where blind ones cost
    nothing (then recall is theirs), else `above` that recall.
    """
    policy, prefetcher = graded

    def speed(share: float) -> tuple[float, float]:
        guesses, recall = source.of_share(share)
        return simulation.run(policy, replace(prefetcher, guesses=guesses)).tokens_per_s, recall

    if speed(1.0)[0] <= without:
        return {"pays": "never", "recall": None}
    blind, blind_recall = speed(0.0)
    if blind >= without:
        return {"pays": "always", "recall": blind_recall}
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if speed(middle)[0] >= without else (middle, high)
    return {"pays": "above", "recall": source.of_share(high)[1]}
