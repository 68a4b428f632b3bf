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


@pytest.fixture(scope="module")
def four_layers(make_workload: Make) -> Workload:
    """Two sequences of 15 tokens through four layers, which never need an expert again that a cache of 8 still has."""
    return make_workload(np.tile(np.arange(30)[:, None, None] % 8, (1, 4, 1)), 8, [15, 15])


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_a_farther_prediction_leaves_more_of_a_sequence_s_first_layers_unforeseen(
    horizon: int, four_layers: Workload, make_timing: Machine
) -> None:
    ahead = Prefetcher(perfect_guesses(four_layers), horizon, budget=1)
    simulation = Simulation(four_layers, make_timing(transfer=110, other=0), 8)  # a layer computes for 110 ns
    assert simulation.run("lru", ahead).totals["waiting_ns"] == 2 * horizon * 110


def test_a_prediction_too_slow_for_one_layer_is_in_time_two_layers_ahead(
    four_layers: Workload, make_timing: Machine
) -> None:
    simulation = Simulation(four_layers, make_timing(transfer=100, other=0), 8)
    ahead = Prefetcher(perfect_guesses(four_layers), 1, budget=1, predict_ns=100)
    assert simulation.run("lru", ahead).totals["late"] > 50
    two_ahead = simulation.run("lru", replace(ahead, horizon=2))
    assert two_ahead.totals["late"] == 0
    assert two_ahead.totals["waiting_ns"] == 2 * 2 * 100


def test_predicting_farther_does_not_widen_the_link(four_layers: Workload, make_timing: Machine) -> None:
    simulation = Simulation(four_layers, make_timing(transfer=165, other=0), 8)
    ahead = Prefetcher(perfect_guesses(four_layers), 1, budget=1)
    assert simulation.run("lru", ahead).total_ns == simulation.run("lru", replace(ahead, horizon=2)).total_ns


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
