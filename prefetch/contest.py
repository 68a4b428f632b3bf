"""Who is compared with whom: which prefetchers run under which policies, and which row counts as the best."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from prefetch.rows import Row
from prefetch.settings import SimulateSettings
from prefetch.simulation import POLICIES, Prefetcher, Simulation

FOREKNOWING = "belady"  # the policy that no machine can have


def all_rows(
    simulation: Simulation, prefetchers: Mapping[str, Prefetcher], predictors: list[str], settings: SimulateSettings
) -> list[Row]:
    """Return caching alone under every policy, and each prefetcher under the best of them, `guided` and `belady`.

    Where the user names policies, every prefetcher is simulated under each.
    """

    def row(prefetcher: str, policy: str, with_it: Prefetcher | None) -> Row:
        return Row.of(prefetcher, policy, simulation.run(policy, with_it), settings.bootstrap, settings.seed)

    policies = list(settings.policies) or [
        policy for policy in POLICIES if not (policy == "static" and simulation.rate_LE is None)
    ]
    alone = [
        row("none", policy, alone_with(prefetchers, predictors, policy))
        for policy in policies
        if policy != "guided" or predictors
    ]
    chosen = policies
    if not settings.policies:
        chosen = [policy for policy in policies if policy in {best_caching(alone).policy, "guided", FOREKNOWING}]
    return alone + [row(name, policy, each) for name, each in prefetchers.items() for policy in chosen]


def alone_with(prefetchers: Mapping[str, Prefetcher], predictors: list[str], policy: str) -> Prefetcher | None:
    """Return what is known where nothing is prefetched: nothing, or, to evict by, the first predictor's scores."""
    return replace(prefetchers[predictors[0]], budget=0) if policy == "guided" else None


def best_caching(rows: list[Row]) -> Row:
    """Return the fastest row without prefetching, among policies that need neither a predictor nor the future."""
    alone = [row for row in rows if row.prefetcher == "none"]
    plain = [row for row in alone if row.policy not in ("guided", FOREKNOWING)]
    return max(plain or alone, key=_merit)


def best_of(rows: list[Row], names: Collection[str]) -> Row | None:
    """Return the fastest row of these prefetchers, under a policy that a machine can have where there is one."""
    own = [row for row in rows if row.prefetcher in names]
    real = [row for row in own if row.policy != FOREKNOWING]
    return max(real or own, key=_merit, default=None)


def _merit(row: Row) -> tuple[float, bool, bool]:
    """Where rows are equally fast, as where nothing is fetched, take the policy that does best where they are not."""
    return row.tokens_per_s, row.policy == "guided", row.policy == "lfu_aged"
