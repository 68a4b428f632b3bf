"""What is fetched ahead, and what it saves: times in ns that follow from a sum.

With the machine of `make_timing` and one layer, a token takes 150 ns where its expert is there, and a transfer 1000.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prefetch.guesses import Guesses, perfect_guesses
from prefetch.simulation import Prefetcher, Simulation
from prefetch.timing import Timing
from prefetch.workload import Workload

Make = Callable[..., Workload]
Machine = Callable[..., Timing]


def test_perfect_predictions_whose_transfers_fit_into_computing_never_wait(cycling: Make, make_timing: Machine) -> None:
    workload = cycling(40, 8)
    simulation = Simulation(workload, make_timing(transfer=150), 2)
    outcome = simulation.run("lru", Prefetcher(perfect_guesses(workload), horizon=1, budget=1))
    assert outcome.totals["waiting_ns"] == 150  # the first token, which nothing predicts
    assert (outcome.totals["prefetched"], outcome.totals["useful"]) == (39, 39)
    # one ns more, and every other token waits for it
    late = simulation.changed(timing=make_timing(transfer=151)).run(
        "lru", Prefetcher(perfect_guesses(workload), horizon=1, budget=1)
    )
    assert late.totals["waiting_ns"] == 151 + 39
    assert late.totals["late"] == 39
    assert simulation.run("lru").totals["waiting_ns"] == 40 * 150


@pytest.mark.parametrize("seed", range(4))
def test_with_the_best_eviction_they_wait_in_no_layer_but_the_first(
    seed: int, random_workload: Make, make_timing: Machine
) -> None:
    workload = random_workload([30], experts=8, top_k=2, seed=seed)
    simulation = Simulation(workload, make_timing(transfer=60), 4)  # two are fetched in the 120 ns of a layer
    outcome = simulation.run("belady", Prefetcher(perfect_guesses(workload), horizon=1, budget=2))
    assert outcome.totals["waiting_ns"] == 2 * 60
    assert outcome.totals["wasted"] == outcome.totals["late"] == 0
    assert simulation.run("belady").totals["waiting_ns"] > 20 * 60


def test_a_prediction_and_its_transfer_share_the_time_of_a_layer(cycling: Make, make_timing: Machine) -> None:
    workload = cycling(40, 8)
    simulation = Simulation(workload, make_timing(transfer=100), 2)
    in_time = Prefetcher(perfect_guesses(workload), horizon=1, budget=1, predict_ns=50)
    assert simulation.run("lru", in_time).totals["waiting_ns"] == 100
    assert simulation.run("lru", replace(in_time, predict_ns=51)).totals["late"] > 0


def test_a_prediction_that_never_comes_in_time_is_none(cycling: Make, make_timing: Machine) -> None:
    workload = cycling(40, 8)
    simulation = Simulation(workload, make_timing(), 2)
    slow = Prefetcher(perfect_guesses(workload), horizon=1, budget=1, predict_ns=10**9)
    outcome, without = simulation.run("lru", slow), simulation.run("lru")
    assert outcome.totals["predicted"] == 0
    assert outcome.totals["skipped"] == 37  # of 39 asked, the first is still being worked on, and the last waits
    assert {**outcome.totals, "skipped": 0} == without.totals


def test_two_layers_ahead_hide_a_transfer_of_two_layers(random_workload: Make, make_timing: Machine) -> None:
    ids_TLK = np.arange(30)[:, None, None] % 8 * np.ones((1, 4, 1), int)
    workload = replace(random_workload([30], layers=4, experts=8, top_k=1), expert_ids_TLK=ids_TLK.astype(np.uint16))
    timing = make_timing(transfer=110, other=0)
    simulation = Simulation(workload, timing, 8)
    waits = {
        horizon: simulation.run("lru", Prefetcher(perfect_guesses(workload), horizon, budget=1)).totals["waiting_ns"]
        for horizon in (1, 2, 3)
    }
    assert waits == {1: 110, 2: 2 * 110, 3: 3 * 110}  # a sequence's first layers have nothing before them
    slower = simulation.changed(timing=make_timing(transfer=165, other=0))
    one, two = (slower.run("lru", Prefetcher(perfect_guesses(workload), h, budget=1)).total_ns for h in (1, 2))
    assert one == two  # the link, not the horizon, is the limit: it is never idle


@pytest.mark.parametrize(
    ("change", "fetched"),
    [
        ({"budget": 2}, {0, 1}),
        ({"budget": 1}, {0}),
        ({"budget": 2, "threshold": 0.5}, {0}),
        ({"budget": 2, "threshold": 0.95}, set()),
        ({"budget": 0}, set()),
    ],
)
def test_only_guesses_within_the_budget_and_likely_enough_are_fetched(
    change: dict[str, float], fetched: set[int], make_workload: Make, make_timing: Machine
) -> None:
    workload = make_workload([[[5]], [[6]]], 8)
    ids_TLB = np.array([[[0, 1, 2]]] * 2, dtype=np.uint16)
    guesses = Guesses(ids_TLB, np.array([[[0.9, 0.4, 0.2]]] * 2, dtype=np.float32))
    simulation = Simulation(workload, make_timing(transfer=10), 8)
    outcome = simulation.run("lru", Prefetcher(guesses, **change))
    assert outcome.totals["predicted"] == 1
    assert outcome.totals["prefetched"] == outcome.unused == len(fetched)
