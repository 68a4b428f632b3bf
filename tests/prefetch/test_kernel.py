"""The compiled simulation: equal to the plain one, and true to what must hold of any cache and any link."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefetch import reference
from prefetch.guesses import Guesses, perfect_guesses
from prefetch.simulation import POLICIES, Outcome, Prefetcher, Simulation
from prefetch.timing import Timing
from prefetch.workload import Workload
from speculation.predictor import RoutingShape

ONLINE = [policy for policy in POLICIES if policy not in ("guided", "belady")]
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclasses.dataclass(frozen=True)
class Case:
    """A small simulation, and what is prefetched in it."""

    simulation: Simulation
    prefetcher: Prefetcher | None

    def run(self, policy: str) -> Outcome:
        return self.simulation.run(policy, self.prefetcher)


@st.composite
def cases(draw: st.DrawFn, *, prefetch: bool | None = None, ram: bool = True) -> Case:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    top_k, batch = draw(st.integers(1, min(3, experts))), draw(st.integers(1, 3))
    lengths_S = generator.integers(1, 9, size=draw(st.integers(1, 4)))
    tokens = int(lengths_S.sum())
    # A few favourites, so that caches have something to learn.
    taste_LE = generator.random((layers, experts)) ** 3 + 0.02
    ids_TLK = np.argsort(-generator.random((tokens, layers, experts)) * taste_LE, axis=2)[:, :, :top_k]
    workload = Workload(
        RoutingShape(layers, experts, top_k), ids_TLK.astype(np.uint16), lengths_S, ["d"] * len(lengths_S), True
    )
    timing = Timing(
        expert_bytes=1000,
        transfer_ns=draw(st.sampled_from([0, 1, 30, 400, 5000])),
        read_ns=draw(st.sampled_from([1, 90, 2000])),
        attention_ns_A=np.arange(batch + 1) * 7 + draw(st.sampled_from([0, 20, 300])),
        experts_ns_AE=np.arange((batch + 1) * (experts + 1)).reshape(batch + 1, experts + 1) * draw(st.integers(0, 9)),
        other_ns_A=np.arange(batch + 1) * draw(st.sampled_from([0, 50])),
    )
    pooled = draw(st.booleans())
    least = min(experts, batch * top_k) * (1 if pooled else layers)
    simulation = Simulation(
        workload,
        timing,
        draw(st.integers(least, layers * experts)),
        generator.random((layers, experts)) if draw(st.booleans()) else None,
        batch,
        pooled,
        draw(st.none() | st.integers(min(experts, batch * top_k) + 2, 4 * experts)) if ram else None,
    )
    if not (draw(st.booleans()) if prefetch is None else prefetch):
        return Case(simulation, None)
    chances_TLE = generator.random((tokens, layers, experts)).astype(np.float32)
    guesses = Guesses(np.argsort(-chances_TLE, axis=2).astype(np.uint16), -np.sort(-chances_TLE, axis=2))
    if draw(st.booleans()):
        guesses = perfect_guesses(workload)
    return Case(
        simulation,
        Prefetcher(
            guesses,
            horizon=draw(st.integers(1, layers)),
            budget=draw(st.integers(0, experts)),
            threshold=draw(st.sampled_from([0.0, 0.6])),
            predict_ns=draw(st.sampled_from([0, 15, 900])),
        ),
    )


@FEW
@given(cases(), st.sampled_from(sorted(POLICIES)))
def test_the_compiled_simulation_equals_the_plain_one(case: Case, policy: str) -> None:
    if (policy == "guided" and case.prefetcher is None) or (policy == "static" and case.simulation.rate_LE is None):
        policy = "lru"
    compiled = case.simulation.run(policy, case.prefetcher)
    plain = case.simulation.run(policy, case.prefetcher, run=reference.run)
    assert compiled.totals == plain.totals
    assert compiled.unused == plain.unused
    np.testing.assert_array_equal(compiled.shares_SC, plain.shares_SC)


@FEW
@given(cases(), st.sampled_from(["lru", "lfu", "lfu_aged", "belady"]))
def test_time_bytes_and_experts_balance_exactly(case: Case, policy: str) -> None:
    outcome = case.run(policy)
    totals, timing = outcome.totals, case.simulation.timing
    assert totals["tokens"] == case.simulation.workload.lengths_S.sum()
    assert totals["lookups"] == totals["hits"] + totals["late"] + totals["demanded"]
    assert totals["prefetched"] == totals["useful"] + totals["late"] + totals["wasted"] + outcome.unused
    moved = totals["demanded"] + totals["prefetched"]
    assert outcome.bytes_moved == moved * timing.expert_bytes
    assert totals["link_ns"] == moved * timing.transfer_ns
    assert totals["disk_ns"] == totals["disk_reads"] * timing.read_ns
    assert totals["waiting_ns"] <= outcome.total_ns
    assert moved - totals["evicted"] <= case.simulation.capacity  # what came and did not leave has a slot
    assert totals["demanded"] * timing.transfer_ns <= outcome.total_ns  # nothing computes before its experts are there
    np.testing.assert_allclose(outcome.shares_SC.sum(axis=0), list(totals.values()), rtol=1e-12)
    tokens = outcome.shares_SC[:, list(totals).index("tokens")]
    np.testing.assert_allclose(tokens, case.simulation.workload.lengths_S)
    if case.prefetcher is None:
        assert totals["prefetched"] == totals["late"] == totals["cancelled"] == totals["predicted"] == 0


@FEW
@given(cases(prefetch=False))
def test_belady_never_misses_more_than_another_policy(case: Case) -> None:
    best = case.run("belady").totals["demanded"]
    for policy in ONLINE:
        if policy != "static" or case.simulation.rate_LE is not None:
            assert best <= case.run(policy).totals["demanded"], policy


@FEW
@given(cases(prefetch=False, ram=False), st.integers(0, 9))
def test_lru_never_misses_more_with_more_room(case: Case, more: int) -> None:
    simulation = case.simulation.changed(rate_LE=None)
    shape = simulation.workload.shape
    larger = min(shape.num_layers * shape.num_experts, simulation.capacity + more)
    missed = simulation.run("lru").totals["demanded"]
    assert simulation.changed(capacity=larger).run("lru").totals["demanded"] <= missed


@FEW
@given(cases(prefetch=True, ram=False), st.sampled_from(["lru", "lfu", "belady"]))
def test_perfect_foresight_with_an_infinite_link_never_waits(case: Case, policy: str) -> None:
    assert case.prefetcher is not None
    workload = case.simulation.workload
    simulation = case.simulation.changed(timing=dataclasses.replace(case.simulation.timing, transfer_ns=0))
    perfect = Prefetcher(perfect_guesses(workload), case.prefetcher.horizon, workload.shape.top_k)
    assert simulation.run(policy, perfect).totals["waiting_ns"] == 0


@FEW
@given(cases(), st.sampled_from(["lru", "lfu_aged", "belady"]))
def test_equal_inputs_give_equal_runs_to_the_bit(case: Case, policy: str) -> None:
    first, again = case.run(policy), case.run(policy)
    assert first.totals == again.totals
    np.testing.assert_array_equal(first.shares_SC, again.shares_SC)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu_aged", "belady"])
def test_an_expert_that_is_there_is_never_fetched(policy: str) -> None:
    generator = np.random.default_rng(0)
    ids_TLK = np.argsort(generator.random((40, 3, 6)), axis=2)[:, :, :2].astype(np.uint16)
    workload = Workload(RoutingShape(3, 6, 2), ids_TLK, np.array([40]), ["d"], True)
    timing = Timing(1, 100, 1, np.full(2, 10), np.full((2, 7), 10), np.zeros(2, np.int64))
    outcome = Simulation(workload, timing, 18).run(policy)
    assert outcome.totals["demanded"] == len(np.unique(ids_TLK + 6 * np.arange(3)[:, None]))
    assert outcome.totals["evicted"] == 0
