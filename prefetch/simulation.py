"""One simulated run: a workload on a machine, under a policy of eviction and with a prefetcher, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from prefetch import kernel
from prefetch.guesses import Guesses, no_guesses
from prefetch.timing import Timing
from prefetch.workload import Schedule, Workload

POLICIES = {
    "lru": kernel.LRU,
    "lfu": kernel.LFU,
    "lfu_aged": kernel.LFU_AGED,
    "static": kernel.STATIC,
    "guided": kernel.GUIDED,
    "belady": kernel.BELADY,
}
HALF_LIFE = 64  # decode steps after which lfu_aged and guided count a use half


@dataclass(frozen=True)
class Prefetcher:
    """Guesses `horizon` layers ahead, of which the first `budget` that reach `threshold` are fetched."""

    guesses: Guesses
    horizon: int = 1
    budget: int = 0
    threshold: float = 0.0
    predict_ns: int = 0
    """Of one prediction for one sequence and layer."""


@dataclass(frozen=True)
class Outcome:
    """Exact totals by the names of `kernel.COUNTERS`, and how they fall to the sequences.

    A decode step's share goes in equal parts to the sequences it moves; `unused` prefetches were left at the end.
    """

    totals: dict[str, int]
    shares_SC: NDArray[np.float64]
    unused: int
    expert_bytes: int

    @property
    def total_ns(self) -> int:
        return sum(self.totals[name] for name in ("attention_ns", "experts_ns", "other_ns", "waiting_ns"))

    @property
    def tokens_per_s(self) -> float:
        return 1e9 * self.totals["tokens"] / self.total_ns if self.total_ns else float("inf")

    @property
    def hit_rate(self) -> float:
        return self.totals["hits"] / self.totals["lookups"]

    @property
    def bytes_moved(self) -> int:
        """Bytes that began to cross the link."""
        return (self.totals["demanded"] + self.totals["prefetched"]) * self.expert_bytes


@dataclass(frozen=True)
class Simulation:
    """A workload on a machine whose GPU holds `capacity` experts; raises ConfigurationError where that is too few.

    `rate_LE` says how often a token needs each expert, as far as is known before the run: with it the cache
    starts with the experts used most, without it empty. Slots are `pooled` over the layers or shared out evenly among
    them. RAM holds `ram_experts` of all experts, and all of them where that is None; the rest are read from the disk.
    Sequences follow each other on one machine: what one leaves in the cache, the next one finds.
    """

    workload: Workload
    timing: Timing
    capacity: int
    rate_LE: NDArray[np.float64] | None = None
    batch_size: int = 1
    pooled: bool = True
    ram_experts: int | None = None

    def __post_init__(self) -> None:
        shape, needed, least = self.workload.shape, self._most_needed, self.least_capacity
        everything = self._size
        if self.capacity < least:
            raise ConfigurationError(
                f"--cache_experts {self.capacity}: one layer of this workload runs up to {needed} experts at once"
                f"{'' if self.pooled else f', so that {shape.num_layers} separate layers need {least}'}; give at least "
                f"{least} of the {everything}, or a smaller --batch_size"
            )
        if self.ram_experts is not None and self.ram_experts < needed + 2:
            raise ConfigurationError(
                f"--ram_experts {self.ram_experts}: RAM has to hold the experts that a layer waits for; give at least "
                f"{needed + 2} of the {everything}"
            )

    @property
    def least_capacity(self) -> int:
        """The smallest capacity that can run this workload."""
        return self._most_needed * (1 if self.pooled else self.workload.shape.num_layers)

    def run(self, policy: str, prefetcher: Prefetcher | None = None, run: Callable[..., Any] = kernel.run) -> Outcome:
        """Decode the workload under a policy; the same inputs give the same outcome to the bit.

        Raises ConfigurationError for a policy that is unknown or needs what is not there.
        """
        self._check(policy, prefetcher)
        if prefetcher is None:
            prefetcher = Prefetcher(no_guesses(self.workload), horizon=0)
        next_RLK, first_X = (
            self._next_visits if policy == "belady" else (np.zeros((0, 0, 0), np.int32), np.zeros(self._size, np.int64))
        )
        shape, timing = self.workload.shape, self.timing
        machine = kernel.Machine(
            layers=shape.num_layers,
            experts=shape.num_experts,
            policy=POLICIES[policy],
            horizon=prefetcher.horizon,
            budget=prefetcher.budget,
            half_life=HALF_LIFE,
            transfer_ns=timing.transfer_ns,
            read_ns=timing.read_ns,
            predict_ns=prefetcher.predict_ns,
            ram_slots=self._ram_slots,
            threshold=prefetcher.threshold,
            attention_ns_A=timing.attention_ns_A,
            experts_ns_AE=timing.experts_ns_AE,
            other_ns_A=timing.other_ns_A,
            group_L=np.zeros(shape.num_layers, np.int64) if self.pooled else np.arange(shape.num_layers),
            first_slot_G=np.cumsum([0, *self._group_sizes]),
        )
        guesses = prefetcher.guesses
        work = kernel.Work(
            *self._schedule, self.workload.expert_ids_TLK, next_RLK, first_X, guesses.ids_TLB, guesses.p_TLB
        )
        totals, shares_SC, unused = run(
            machine, work, self._start(policy, prefetcher.budget), len(self.workload.lengths_S)
        )
        named = dict(zip(kernel.COUNTERS, map(int, totals), strict=True))
        return Outcome(named, shares_SC, int(unused), timing.expert_bytes)

    def changed(self, **changes: Any) -> Simulation:
        """Return the same with other fields."""
        return replace(self, **changes)

    def _check(self, policy: str, prefetcher: Prefetcher | None) -> None:
        if policy not in POLICIES:
            raise ConfigurationError(f"--policy {policy}: unknown; choose among {', '.join(POLICIES)}")
        if policy == "guided" and prefetcher is None:
            raise ConfigurationError("--policy guided: evicts by a predictor's scores; name one with --predictor_dir")
        if policy == "static" and self.rate_LE is None:
            raise ConfigurationError(
                "--policy static: keeps the experts used most in training, but these traces have no train split and no "
                "predictor folder with counts was given; name one with --predictor_dir, or leave the policy out"
            )

    @property
    def _size(self) -> int:
        return self.workload.shape.num_layers * self.workload.shape.num_experts

    @property
    def _ram_slots(self) -> int:
        return 0 if self.ram_experts is None or self.ram_experts >= self._size else self.ram_experts

    @property
    def _group_sizes(self) -> list[int]:
        """Slots of each group of layers; those left over go to the lowest layers, none gets more than E."""
        shape = self.workload.shape
        if self.pooled:
            return [min(self.capacity, self._size)]
        each, left = divmod(self.capacity, shape.num_layers)
        return [min(each + (layer < left), shape.num_experts) for layer in range(shape.num_layers)]

    @cached_property
    def _schedule(self) -> Schedule:
        return self.workload.schedule(self.batch_size)

    @cached_property
    def _most_needed(self) -> int:
        return self.workload.most_needed(self._schedule)

    @cached_property
    def _next_visits(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self.workload.next_visits(self._schedule)

    def _start(self, policy: str, budget: int) -> kernel.Start:
        """Fill the cache and RAM with the experts used most; `static` keeps all but the slots that misses need."""
        shape, rate_LE = self.workload.shape, self.rate_LE
        known = rate_LE is not None
        rate_X = np.full(self._size, shape.top_k / shape.num_experts) if rate_LE is None else rate_LE.ravel()
        slots, kept = [], np.zeros(self._size, np.bool_)
        for group, size in enumerate(self._group_sizes):
            own = np.arange(self._size) if self.pooled else np.arange(shape.num_experts) + group * shape.num_experts
            likeliest = own[np.argsort(-rate_X[own], kind="stable")][:size] if known else np.full(size, -1)
            slots.append(likeliest)
            if policy == "static":
                staging = self._most_needed * (2 if budget else 1)
                kept[likeliest[: max(0, size - staging)]] = True
        ram = np.full(self._ram_slots, -1)
        if known and self._ram_slots:
            ram = np.argsort(-rate_X, kind="stable")[: self._ram_slots]
        return kernel.Start(
            np.concatenate(slots).astype(np.int64), ram.astype(np.int64), rate_X.astype(np.float64), kept
        )


def usage_rates(counts_LE: Mapping[str, Any] | NDArray[np.int64], top_k: int) -> NDArray[np.float64]:
    """Return, from how often each expert was chosen, how often one token needs it: K in the sum over a layer."""
    usage_LE = np.asarray(counts_LE, dtype=np.float64)
    total_L1 = usage_LE.sum(axis=1, keepdims=True)
    share_LE = np.where(total_L1 > 0, usage_LE / np.maximum(total_L1, 1), 1 / usage_LE.shape[1])
    return np.asarray(np.minimum(1.0, top_k * share_LE))
