"""What it depends on: the recall that breaks even where it can be reckoned, and sweeps of cache and link."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prefetch.guesses import GradedGuesses, perfect_guesses
from prefetch.simulation import Prefetcher, Simulation
from prefetch.sweep import CACHE_SHARES, LINK_FACTORS, break_even, sweep
from prefetch.timing import Timing
from prefetch.workload import Workload

Make = Callable[..., Workload]
Machine = Callable[..., Timing]


def found(simulation: Simulation, horizon: int = 1) -> dict[str, float | str | None]:
    """What `break_even` says about made-up prefetchers with LRU."""
    workload = simulation.workload
    graded = "lru", Prefetcher(perfect_guesses(workload), horizon, workload.shape.top_k)
    return break_even(simulation, graded, GradedGuesses(workload, seed=0), simulation.run("lru").tokens_per_s)


def test_wrong_guesses_cost_nothing_where_their_transfers_fit_beside_the_computing(
    cycling: Make, make_timing: Machine
) -> None:
    # Nothing is ever used again, so there is nothing to lose in the cache, and the link is free when it is needed.
    point = found(Simulation(cycling(400, 16), make_timing(transfer=150, experts=16), 4))
    assert point["pays"] == "always"
    assert point["recall"] == pytest.approx(1 / 16, abs=0.03)


@pytest.mark.parametrize("window_share", [0.25, 0.5, 0.75])
def test_guesses_that_keep_the_link_busy_have_to_be_right_as_often_as_they_are_in_the_way(
    window_share: float, cycling: Make, make_timing: Machine
) -> None:
    # A right guess saves the 150 ns of a token, w; a wrong one costs t - w. With a share s right, as fast as none:
    # s * w = (1 - s) * (t - w), so s = 1 - w / t.
    transfer = round(150 / window_share)
    point = found(Simulation(cycling(600, 64), make_timing(transfer=transfer, experts=64), 4))
    assert point["pays"] == "above"
    share = 1 - window_share
    assert point["recall"] == pytest.approx(share + (1 - share) / 64, abs=0.03)


def test_even_perfect_guesses_do_not_pay_that_drive_out_what_is_needed_before_them(
    make_workload: Make, make_timing: Machine
) -> None:
    # Sequences of one token: two layers ahead, only layer 2 is foreseen. Of three slots LRU then gives it that of
    # layer 1's one expert, which is needed first; without prefetching it would take the one of the last token.
    tokens = 80
    ids_TLK = np.stack([np.zeros(tokens, int), np.zeros(tokens, int), np.arange(tokens) % 16], axis=1)[:, :, None]
    workload = make_workload(ids_TLK, 16, [1] * tokens)
    simulation = Simulation(workload, make_timing(experts=16), 3)
    assert found(simulation, horizon=2) == {"pays": "never", "recall": None}


def test_where_nothing_waits_no_guess_pays(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([30])
    simulation = Simulation(workload, make_timing(experts=6), 18, rate_LE=np.ones((3, 6)))
    assert found(simulation) == {"pays": "never", "recall": None}


@pytest.fixture(scope="module")
def swept(random_workload: Make, make_timing: Machine) -> dict[str, object]:
    workload = random_workload([15, 9, 21], experts=8)
    simulation = Simulation(workload, make_timing(transfer=200), 10)
    perfect = Prefetcher(perfect_guesses(workload), horizon=1, budget=2)
    contestants = {
        "none": ("lru", None),
        "perfect": ("lru", perfect),
        "oracle": ("belady", replace(perfect, horizon=3)),
    }
    return sweep(simulation, contestants, ("lru", perfect), seed=0)


def test_a_sweep_has_every_contestant_at_every_cache_and_link(swept: dict[str, object]) -> None:
    assert json.loads(json.dumps(swept, allow_nan=False)) == swept
    assert swept["policies"] == {"none": "lru", "perfect": "lru", "oracle": "belady"}
    assert (swept["sequences"], swept["tokens"], swept["break_even_policy"]) == (3, 45, "lru")
    assert [point["cache_experts"] for point in swept["by_cache"]] == [3, 6, 9, 10, 12, 15, 18, 21]
    assert [point["share"] * 24 for point in swept["by_cache"]] == pytest.approx([3, 6, 9, 10, 12, 15, 18, 21])
    assert len(CACHE_SHARES) == 7
    assert [point["link_factor"] for point in swept["by_link"]] == list(LINK_FACTORS)
    for point in (*swept["by_cache"], *swept["by_link"]):
        assert set(point["tokens_per_s"]) == {"none", "perfect", "oracle"}
        assert point["break_even"]["pays"] in ("always", "above", "never")


def test_the_set_up_itself_is_a_point_of_both_sweeps(swept: dict[str, object]) -> None:
    (here,) = (point for point in swept["by_cache"] if point["cache_experts"] == 10)
    (same,) = (point for point in swept["by_link"] if point["link_factor"] == 1)
    assert here["tokens_per_s"] == same["tokens_per_s"]
    assert here["break_even"] == same["break_even"]


def test_more_cache_and_a_faster_link_never_slow_lru_down(swept: dict[str, object]) -> None:
    for axis in ("by_cache", "by_link"):
        speeds = [point["tokens_per_s"]["none"] for point in swept[axis]]
        assert speeds == sorted(speeds)
        assert speeds[-1] > 1.2 * speeds[0]
        assert all(point["tokens_per_s"]["oracle"] > point["tokens_per_s"]["none"] for point in swept[axis])


def test_no_point_has_a_cache_too_small_for_the_workload(random_workload: Make, make_timing: Machine) -> None:
    workload = random_workload([9, 9, 9], experts=8)
    simulation = Simulation(workload, make_timing(batch=3), 24, batch_size=3, pooled=False)
    perfect = Prefetcher(perfect_guesses(workload), horizon=1, budget=2)
    points = sweep(simulation, {"none": ("lru", None)}, ("lru", perfect), seed=0)["by_cache"]
    sizes = [point["cache_experts"] for point in points]
    assert sizes[0] == simulation.least_capacity > 24 * CACHE_SHARES[1]
    assert sizes[-1] == 24
