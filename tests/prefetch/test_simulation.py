"""Runs whose outcome follows from a sum: times in ns, of one layer and one expert a token where nothing else is said.

With the machine of `make_timing` a token then takes 150 ns where its expert is there, and a transfer 1000.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from prefetch.guesses import Guesses, perfect_guesses
from prefetch.simulation import POLICIES, Prefetcher, Simulation, usage_rates
from prefetch.timing import Timing
from prefetch.workload import Workload

Make = Callable[..., Workload]
Machine = Callable[..., Timing]


def textbook_lru(workload: Workload, capacity: int) -> int:
    """How many experts a cache misses that forgets what was used longest ago; one expert a token and layer."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    missed = 0
    for layers in workload.expert_ids_TLK[:, :, 0].tolist():
        for expert in enumerate(layers):
            missed += expert not in held
            held[expert] = None
            held.move_to_end(expert)
            if len(held) > capacity:
                held.popitem(last=False)
    return missed


@pytest.mark.parametrize("policy", POLICIES)
def test_where_everything_fits_and_is_there_only_computing_takes_time(
    policy: str, random_workload: Make, make_timing: Machine
) -> None:
    workload, timing = random_workload([20, 30]), make_timing(experts=6)
    simulation = Simulation(workload, timing, 18, rate_LE=np.random.default_rng(0).random((3, 6)))
    outcome = simulation.run(policy, Prefetcher(perfect_guesses(workload), horizon=1, budget=2))
    assert outcome.total_ns == 50 * timing.resident_ns(3, 2) == 50 * (3 * 120 + 40)
    assert outcome.tokens_per_s == pytest.approx(1e9 / 400)
    assert outcome.hit_rate == 1
    assert outcome.bytes_moved == outcome.unused == outcome.totals["waiting_ns"] == outcome.totals["evicted"] == 0


def test_a_cold_cache_with_room_for_all_fetches_each_expert_once(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([50])
    used = len(np.unique(workload.expert_ids_TLK + 6 * np.arange(3)[:, None]))
    outcome = Simulation(workload, make_timing(experts=6), 18).run("lru")
    assert outcome.totals["demanded"] == used
    assert outcome.total_ns == 50 * 400 + used * 1000
    assert outcome.bytes_moved == used * 1_000_000


def test_a_cache_one_smaller_than_a_cycle_hits_never_with_lru_and_every_second_time_with_foresight(
    cycling: Make, make_timing: Machine
) -> None:
    simulation = Simulation(cycling(12, 4), make_timing(), 3)
    lru, belady = simulation.run("lru"), simulation.run("belady")
    assert (lru.hit_rate, lru.total_ns) == (0, 12 * (150 + 1000))
    # 0, 1, 2, then 3 for 2, then 2 for 1, then 1 for 0: the one needed last of all leaves
    assert belady.totals["demanded"] == 6
    assert belady.total_ns == 12 * 150 + 6 * 1000


def test_counting_uses_keeps_what_was_used_most_whatever_comes_lately(
    make_workload: Make, make_timing: Machine
) -> None:
    needed = np.array([0, 0, 0, 1, 2, 1, 2, 0])
    simulation = Simulation(make_workload(needed[:, None, None], 3), make_timing(experts=3), 2)
    missed = {policy: simulation.run(policy).totals["demanded"] for policy in ("lru", "lfu", "belady")}
    assert missed == {"lru": 4, "lfu": 5, "belady": 4}


def test_counting_with_ageing_forgets_a_favourite_of_long_ago(make_workload: Make, make_timing: Machine) -> None:
    needed = np.array([0] * 60 + [1, 2] * 60)
    simulation = Simulation(make_workload(needed[:, None, None], 3), make_timing(experts=3), 2)
    lfu, aged = (simulation.run(policy).totals["demanded"] for policy in ("lfu", "lfu_aged"))
    assert lfu == 1 + 60 + 60  # expert 0 stays to the end with a count of 60; 1 and 2 drive each other out
    assert 3 < aged < 70


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 8))
def test_lru_is_the_textbook_s(random_workload: Make, make_timing: Machine, seed: int, capacity: int) -> None:
    workload = random_workload([25, 15], layers=2, experts=4, top_k=1, seed=seed)
    simulation = Simulation(workload, make_timing(experts=4), capacity)
    assert simulation.run("lru").totals["demanded"] == textbook_lru(workload, capacity)


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(2, 8))
def test_separate_slots_are_a_cache_for_each_layer(
    random_workload: Make, make_timing: Machine, seed: int, capacity: int
) -> None:
    workload = random_workload([40], layers=2, experts=4, top_k=1, seed=seed)
    layers = [replace(workload, expert_ids_TLK=workload.expert_ids_TLK[:, [layer]]) for layer in range(2)]
    sizes = capacity - capacity // 2, capacity // 2
    outcome = Simulation(workload, make_timing(experts=4), capacity, pooled=False).run("lru")
    assert outcome.totals["demanded"] == sum(map(textbook_lru, layers, sizes))


def test_pooled_slots_go_to_the_layer_that_needs_more(make_workload: Make, make_timing: Machine) -> None:
    ids_TLK = np.stack([np.arange(40) % 4, np.zeros(40, int)], axis=1)[:, :, None]
    simulation = Simulation(make_workload(ids_TLK, 4), make_timing(experts=4), 5)
    assert simulation.run("lru").totals["demanded"] == 5
    assert simulation.changed(pooled=False).run("lru").totals["demanded"] == 40 + 1  # slots 3 and 2


def test_the_cache_starts_with_the_experts_used_most_as_far_as_that_is_known(
    make_workload: Make, make_timing: Machine
) -> None:
    workload = make_workload([[[3], [1]]], 4)
    cold = Simulation(workload, make_timing(experts=4), 2)
    assert cold.run("lru").totals["hits"] == 0
    rate_LE = np.array([[0.1, 0.1, 0.1, 0.5], [0.1, 0.6, 0.2, 0.1]])
    assert cold.changed(rate_LE=rate_LE).run("lru").totals["hits"] == 2
    assert cold.changed(rate_LE=rate_LE[:, ::-1]).run("lru").totals["hits"] == 0
    both_above = np.array([[0.1, 0.1, 0.1, 0.5], [0.1, 0.6, 0.9, 0.1]])
    assert cold.changed(rate_LE=both_above).run("lru").totals["hits"] == 0  # the less likely leaves for layer 0's
    assert cold.changed(rate_LE=both_above, pooled=False).run("lru").totals["hits"] == 1
    assert cold.changed(rate_LE=both_above, pooled=False, capacity=4).run("lru").totals["hits"] == 2


@pytest.mark.parametrize("budget", [0, 1])
def test_static_keeps_its_experts_and_lends_the_other_slots(
    budget: int, random_workload: Make, make_timing: Machine
) -> None:
    workload = random_workload([60], layers=1, experts=8, top_k=1)
    rate_LE = np.arange(8, 0, -1)[None] / 8
    silent = replace(perfect_guesses(workload), p_TLB=np.full((60, 1, 1), -1, np.float32))
    outcome = Simulation(workload, make_timing(), 5, rate_LE).run("static", Prefetcher(silent, 1, budget))
    kept, lent = (3, [4, 3]) if budget else (4, [4])  # a prefetcher is lent as many slots as a layer waits for
    missed = 0
    for expert in workload.expert_ids_TLK.ravel().tolist():
        if expert >= kept:
            missed += expert not in lent
            lent.remove(expert if expert in lent else lent[0])
            lent.append(expert)
    assert outcome.totals["demanded"] == missed > 5


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu_aged", "belady"])
def test_without_a_prefetcher_all_waiting_is_for_demanded_transfers(
    policy: str, random_workload: Make, make_timing: Machine
) -> None:
    workload = random_workload([15, 9, 20], experts=8)
    outcome = Simulation(workload, make_timing(batch=2), 8, batch_size=2).run(policy)
    assert outcome.totals["waiting_ns"] == outcome.totals["demanded"] * 1000 == outcome.totals["link_ns"]


def test_an_infinite_link_never_waits(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([30])
    outcome = Simulation(workload, make_timing(experts=6).with_link(float("inf")), 4).run("lru")
    assert outcome.totals["demanded"] > 10
    assert outcome.total_ns == 30 * 400


def test_sequences_decoded_together_share_what_they_both_need(random_workload: Make, make_timing: Machine) -> None:
    one = random_workload([20])
    twice = replace(
        one, expert_ids_TLK=np.concatenate([one.expert_ids_TLK] * 2), lengths_S=np.array([20, 20]), datasets=["a", "b"]
    )
    alone = Simulation(one, make_timing(batch=2, experts=6), 5).run("lru")
    together = Simulation(twice, make_timing(batch=2, experts=6), 5, batch_size=2).run("lru")
    assert {**together.totals, "tokens": 20} == alone.totals
    assert together.totals["tokens"] == 40
    np.testing.assert_array_equal(together.shares_SC[0], together.shares_SC[1])
    in_turn = Simulation(twice, make_timing(batch=2, experts=6), 5).run("lru")
    assert in_turn.total_ns > 1.9 * together.total_ns


def test_a_run_is_repeatable_to_the_bit(random_workload: Make, make_timing: Machine) -> None:
    def outcome() -> tuple[dict[str, int], bytes, int]:
        workload = random_workload([12, 7, 20], experts=8)
        rng = np.random.default_rng(3)
        p_TLE = -np.sort(-rng.random((39, 3, 8)).astype(np.float32), axis=2)
        guesses = Guesses(np.argsort(rng.random((39, 3, 8)), axis=2).astype(np.uint16), p_TLE)
        simulation = Simulation(workload, make_timing(batch=2), 8, rng.random((3, 8)), 2, ram_experts=14)
        found = simulation.run("guided", Prefetcher(guesses, 2, 2, 0.1, 30))
        return found.totals, found.shares_SC.tobytes(), found.unused

    first = outcome()
    assert first[0]["prefetched"] > 10
    assert outcome() == first


def test_shares_of_sequences_decoded_in_turn_are_what_each_costs(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([10, 15])
    simulation = Simulation(workload, make_timing(experts=6), 18)
    both = simulation.run("lru")
    first = simulation.changed(workload=workload.of(np.array([0]))[0]).run("lru")
    np.testing.assert_array_equal(both.shares_SC[0], list(first.totals.values()))
    np.testing.assert_allclose(both.shares_SC.sum(axis=0), list(both.totals.values()))


def test_too_small_a_cache_is_refused_with_the_smallest_that_will_do(
    random_workload: Make, make_timing: Machine
) -> None:
    workload, timing = random_workload([9, 9]), make_timing(batch=2, experts=6)
    least = Simulation(workload, timing, 18, batch_size=2).least_capacity
    assert 2 < least <= 4
    with pytest.raises(
        ConfigurationError,
        match=rf"--cache_experts 1: one layer of this workload runs up to {least} experts at once; give at least "
        rf"{least} of the 18, or a smaller --batch_size",
    ):
        Simulation(workload, timing, 1, batch_size=2)
    with pytest.raises(ConfigurationError, match=r"up to 2 experts at once, so that 3 separate layers need 6; give at"):
        Simulation(workload, timing, 5, pooled=False)
    Simulation(workload, timing, 6, pooled=False).run("lru")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("fifo", "--policy fifo: unknown; choose among lru, lfu, lfu_aged, static, guided, belady"),
        ("guided", "--policy guided: evicts by a predictor's scores; name one with --predictor_dir"),
        ("static", "--policy static: keeps the experts used most in training, but these traces have no train split"),
    ],
)
def test_a_policy_that_can_not_be_followed_is_refused(
    policy: str, message: str, random_workload: Make, make_timing: Machine
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Simulation(random_workload([9]), make_timing(experts=6), 6).run(policy)


def test_usage_rates_are_how_often_a_token_needs_an_expert() -> None:
    rates = usage_rates(np.array([[3, 1, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]]), top_k=2)
    assert rates.tolist() == [[1, 0.5, 0, 0], [0.5] * 4, [0.5] * 4]  # never more than once, and even where unknown
