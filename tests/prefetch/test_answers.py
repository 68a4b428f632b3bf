"""The three sentences, from simulations in which it is known what limits, what a predictor changes and what helps."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prefetch.answers import halved, sentences, what_else
from prefetch.guesses import Guesses, perfect_guesses
from prefetch.rows import Row
from prefetch.simulation import Prefetcher, Simulation
from prefetch.timing import Timing
from prefetch.workload import Workload

Make = Callable[..., Workload]
Machine = Callable[..., Timing]


def row(simulation: Simulation, name: str, prefetcher: Prefetcher | None = None, policy: str = "lru") -> Row:
    return Row.of(name, policy, simulation.run(policy, prefetcher), resamples=100, seed=0)


def perfect_of(simulation: Simulation, **changes: int) -> Prefetcher:
    return replace(Prefetcher(perfect_guesses(simulation.workload), 1, simulation.workload.shape.top_k), **changes)


def wrong_of(simulation: Simulation) -> Prefetcher:
    """Guesses that are never right: the expert half a cycle away."""
    ids_TLK, experts = simulation.workload.expert_ids_TLK, simulation.workload.shape.num_experts
    ids_TLB = ((ids_TLK + experts // 2) % experts).astype(np.uint16)
    return Prefetcher(Guesses(ids_TLB, np.full(ids_TLB.shape, 0.5, np.float32)), 1, 1)


def answers(simulation: Simulation, predictor: Prefetcher | None = None, recall: float = 0.5) -> list[str]:
    """What is said where a predictor called `made_up` is given, or none."""
    caching, perfect = row(simulation, "none"), row(simulation, "perfect", perfect_of(simulation))
    predicted = None if predictor is None else row(simulation, "made_up", predictor)
    oracle = perfect_of(simulation, horizon=simulation.workload.shape.num_layers)
    changes = what_else(simulation, "lru", predictor, [], perfect_of(simulation), oracle)
    return sentences(simulation, caching, predicted, None, perfect, {"made_up": recall}, changes)


@pytest.fixture
def make_thrashing(cycling: Make, make_timing: Machine) -> Callable[..., Simulation]:
    """Returns a function that makes a simulation in which no expert is there when it is needed: 150 ns and a transfer.

    Of the 16 experts the GPU holds 4.
    """

    def make(**changes: int) -> Simulation:
        return Simulation(cycling(200, 16, sequences=10), make_timing(experts=16, **changes), 4)

    return make


def test_where_all_experts_fit_nothing_limits_but_computing(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([20, 30])
    simulation = Simulation(workload, make_timing(experts=6), 18, rate_LE=np.ones((3, 6)))
    assert answers(simulation)[0] == (
        "Nothing is fetched while decoding, because the GPU holds 100% of the experts: a token takes 0.00 ms, all of "
        "it computing."
    )


@pytest.mark.parametrize(
    ("transfer", "limit", "waiting"),
    [(1000, "the link", "87%"), (75, "computing, and the link next", "33%"), (10, "computing", "6%")],
)
def test_what_limits_is_what_a_token_spends_its_time_on(
    transfer: int, limit: str, waiting: str, make_thrashing: Callable[..., Simulation]
) -> None:
    first = answers(make_thrashing(transfer=transfer))[0]
    assert first.startswith(f"What limits this set-up is {limit}: with the best caching (lru) and no prefetching, ")
    assert f"{waiting} of the 0.00 ms of a token are spent waiting for experts, of which the GPU holds 25%" in first
    assert first.endswith("and 100.0% of the experts needed are not there.")


def test_a_disk_slower_than_the_link_is_what_limits(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing().changed(ram_experts=8)
    assert answers(simulation)[0].startswith("What limits this set-up is the disk: ")


def test_without_a_predictor_what_perfect_ones_would_bring_is_said(make_thrashing: Callable[..., Simulation]) -> None:
    # Each transfer of 150 ns but the first of a sequence, which nothing predicts, is hidden: (150 + 150) * 20 / 3150.
    second = answers(make_thrashing(transfer=150))[1]
    assert second == (
        "No predictor was given; perfect predictions as far ahead would be 1.90 times as fast as caching alone, about "
        "the most that a predictor can add to lru."
    )


def test_a_predictor_that_hides_transfers_is_worth_it(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing(transfer=150)
    assert answers(simulation, perfect_of(simulation), recall=1.0)[1] == (
        "Prefetching with made_up (recall 1.000, lru) is 1.905 times [1.905, 1.905] as fast as lru alone: it is worth "
        "it; perfect predictions as far ahead would be 1.90 times as fast."
    )


def test_a_predictor_that_hides_little_is_a_small_gain(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing(transfer=6)
    assert "as fast as lru alone: a small gain; " in answers(simulation, perfect_of(simulation))[1]


def test_a_predictor_that_is_too_slow_is_not_worth_it(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing(transfer=150)
    said = answers(simulation, perfect_of(simulation, predict_ns=10**9))
    assert "is 1.000 times [1.000, 1.000] as fast as lru alone: not worth it, for 100% of its predictions " in said[1]
    assert "What would add to prefetching with made_up, in times its tokens per second: " in said[2]
    assert "per second: predictions that take no time 1.90, " in said[2]


@pytest.mark.parametrize(("predict_ns", "said"), [(160, "it is worth it, although"), (270, "a small gain, for")])
def test_late_predictions_explain_a_small_gain_and_qualify_a_large_one(
    predict_ns: int, said: str, make_workload: Make, make_timing: Machine
) -> None:
    # A token whose expert is there takes 150 ns, too few for a prediction; one that waits for its expert takes 300.
    ids_TLK = np.concatenate([np.zeros(100, int), np.arange(300) % 16])[:, None, None]
    simulation = Simulation(make_workload(ids_TLK, 16), make_timing(experts=16, transfer=150), 4)
    second = answers(simulation, perfect_of(simulation, predict_ns=predict_ns))[1]
    assert f" as fast as lru alone: {said} " in second
    assert "% of its predictions come too late; perfect" in second


def test_a_predictor_that_is_always_wrong_does_harm(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing()
    said = answers(simulation, wrong_of(simulation), recall=0.0)[1]
    # A wrong transfer is 150 ns under way when the right one is demanded: 1150 of 2000, but for first tokens.
    assert said.startswith("Prefetching with made_up (recall 0.000, lru) is 0.5")
    assert ": it does harm; perfect predictions as far ahead would be 1.1" in said


def test_other_ways_are_simulated_and_the_best_comes_first(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing()
    oracle = perfect_of(simulation)
    found = what_else(simulation, "lru", None, [], perfect_of(simulation), oracle)
    times = {each.what: each.times for each in found}
    assert list(times.values()) == sorted(times.values(), reverse=True)
    tokens = simulation.run("lru").totals["tokens"]
    assert tokens == 200
    assert times["a link twice as fast"] == pytest.approx(1150 / 650)
    assert times["room for twice as many experts"] == 1  # 8 of a cycle of 16
    assert times["experts of half the bytes"] == pytest.approx(1150 / (145 + 500))
    assert times["perfect predictions one layer ahead"] == pytest.approx(1150 / (1150 - 150 * 19 / 20), rel=1e-3)
    assert times["the best possible eviction (belady)"] > 1.1
    assert "predictions that take no time" not in times


def test_room_is_doubled_up_to_all_experts_and_not_beyond(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing()
    perfect = perfect_of(simulation)

    def ways(capacity: int) -> dict[str, float]:
        changes = what_else(
            simulation.changed(capacity=capacity), "lru", None, [], perfect, replace(perfect, horizon=3)
        )
        return {each.what: each.times for each in changes}

    assert ways(8)["room for all experts"] == pytest.approx(200 * 1150 / (200 * 150 + 16 * 1000))
    assert not any(what.startswith("room") for what in ways(16))


def test_where_ram_does_not_hold_everything_more_of_it_is_a_way(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing().changed(ram_experts=8)
    perfect = perfect_of(simulation)
    found = what_else(simulation, "lru", None, [], perfect, perfect)
    times = {each.what: each.times for each in found}
    assert times["RAM for all experts"] == pytest.approx((150 + 1000 + 3000) / (150 + 1000))
    assert times["experts of half the bytes"] == pytest.approx((150 + 1000 + 3000) / (145 + 500))  # RAM holds all 16
    without = what_else(make_thrashing(), "lru", None, [], perfect, perfect)
    assert not any(each.what.startswith("RAM") for each in without)


def test_the_predictor_s_other_horizons_are_among_them(make_thrashing: Callable[..., Simulation]) -> None:
    simulation = make_thrashing(transfer=150)
    perfect, late = perfect_of(simulation), perfect_of(simulation, predict_ns=10**9)
    others = [replace(late, horizon=2), perfect]
    found = what_else(simulation, "lru", late, others, perfect, perfect)
    times = {each.what: each.times for each in found}
    assert times["predictions 2 layers ahead"] == 1  # as late as those of one
    assert times["predictions one layer ahead"] == times["predictions that take no time"] > 1.9


def test_where_nothing_would_help_that_is_said(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([20, 30])
    simulation = Simulation(workload, make_timing(experts=6, expert=0), 18, rate_LE=np.ones((3, 6)))
    assert answers(simulation)[2] == (
        "Nothing that was tried would be faster: neither memory nor link, eviction nor prediction."
    )


def test_what_can_be_had_comes_before_what_gains_nothing_and_what_no_machine_has(
    make_thrashing: Callable[..., Simulation],
) -> None:
    last = answers(make_thrashing())[2]
    assert last.startswith(
        "What would add to caching alone, in times its tokens per second: experts of half the bytes 1.78, a "
        "link twice as fast 1.77; no gain from room for twice as many experts; at the limit, "
    )
    limit = last.partition("; at the limit, ")[2]
    assert "perfect predictions one layer ahead 1.14" in limit
    assert "the best possible eviction (belady) 1.2" in limit
    assert "foresight of a whole token under belady" in limit


def test_halving_the_bytes_halves_what_moves_and_what_is_read(make_timing: Machine) -> None:
    timing = make_timing()
    half = halved(timing)
    assert (half.expert_bytes, half.transfer_ns, half.read_ns) == (500_000, 500, 1500)
    assert half.experts_ns_AE[1].tolist() == [5 * needed for needed in range(9)]
    assert (half.attention_ns_A == timing.attention_ns_A).all()
