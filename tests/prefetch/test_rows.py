"""The table's figures: exact from the totals, with intervals over sequences."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prefetch.guesses import perfect_guesses
from prefetch.rows import Row, format_rows
from prefetch.simulation import Outcome, Prefetcher, Simulation
from prefetch.timing import Timing
from prefetch.workload import Workload

LENGTHS = list(range(5, 25))
INTERVALS = ("tokens_per_s", "waiting_ms_per_token", "hit_rate", "useful_share", "late_share", "bytes_per_token")


@pytest.fixture(scope="module")
def simulation(random_workload: Callable[..., Workload], make_timing: Callable[..., Timing]) -> Simulation:
    return Simulation(random_workload(LENGTHS, experts=8), make_timing(transfer=90), 10)


@pytest.fixture(scope="module")
def without(simulation: Simulation) -> Row:
    return Row.of("none", "lru", simulation.run("lru"), resamples=200, seed=0)


@pytest.fixture(scope="module")
def ahead(simulation: Simulation) -> Row:
    perfect = Prefetcher(perfect_guesses(simulation.workload), horizon=1, budget=2)
    return Row.of("perfect", "lru", simulation.run("lru", perfect), resamples=200, seed=0)


def test_figures_follow_from_the_totals(ahead: Row) -> None:
    totals, figures = ahead.outcome.totals, ahead.figures()
    spent_ns = totals["attention_ns"] + totals["experts_ns"] + totals["other_ns"] + totals["waiting_ns"]
    assert totals["prefetched"] > totals["late"] > 0
    wanted = {
        "tokens_per_s": sum(LENGTHS) / (spent_ns / 1e9),
        "waiting_ms_per_token": totals["waiting_ns"] / 1e6 / sum(LENGTHS),
        "hit_rate": totals["hits"] / totals["lookups"],
        "useful_share": totals["useful"] / totals["prefetched"],
        "late_share": totals["late"] / totals["prefetched"],
        "bytes_per_token": 1e6 * (totals["demanded"] + totals["prefetched"]) / sum(LENGTHS),
    }
    assert {name: figures[name]["value"] for name in INTERVALS} == pytest.approx(wanted)
    assert figures["totals"] == {**totals, "unused": ahead.outcome.unused, "expert_bytes": 1_000_000}
    assert (figures["prefetcher"], figures["policy"]) == ("perfect", "lru")
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_intervals_hold_their_values_and_are_wider_for_fewer_sequences(
    ahead: Row, simulation: Simulation, without: Row
) -> None:
    few = simulation.changed(workload=simulation.workload.of(np.arange(4))[0])
    of_few = Row.of("none", "lru", few.run("lru"), resamples=200, seed=0).figures()["waiting_ms_per_token"]
    for row in (ahead, without):
        for name in INTERVALS:
            figure = row.figures()[name]
            if figure is not None:
                assert figure["low"] < figure["value"] < figure["high"], name
    of_all = without.figures()["waiting_ms_per_token"]
    assert of_few["high"] - of_few["low"] > of_all["high"] - of_all["low"]


def test_a_resample_s_speed_is_that_of_the_sequences_drawn(simulation: Simulation) -> None:
    one = simulation.changed(workload=simulation.workload.of(np.array([7]))[0])
    row = Row.of("none", "lru", one.run("lru"), resamples=5, seed=0)
    speed = row.figures()["tokens_per_s"]
    assert speed["low"] == pytest.approx(speed["value"], rel=1e-12) == speed["high"]


def test_a_row_is_exactly_as_fast_as_itself(without: Row, simulation: Simulation) -> None:
    assert without.faster_than(without) == {"value": 1, "low": 1, "high": 1}
    again = Row.of("again", "lru", simulation.run("lru"), resamples=200, seed=0)
    assert again.faster_than(without) == {"value": 1, "low": 1, "high": 1}


def test_rows_are_compared_on_the_same_sequences(ahead: Row, without: Row) -> None:
    gain = ahead.faster_than(without)
    assert gain["value"] == pytest.approx(ahead.tokens_per_s / without.tokens_per_s)
    assert 1 < gain["low"] < gain["value"] < gain["high"]
    speeds = [row.figures()["tokens_per_s"] for row in (ahead, without)]
    unpaired = speeds[0]["high"] / speeds[1]["low"] - speeds[0]["low"] / speeds[1]["high"]
    assert gain["high"] - gain["low"] < unpaired / 2
    back = without.faster_than(ahead)
    assert (back["low"], back["high"]) == pytest.approx((1 / gain["high"], 1 / gain["low"]), rel=1e-2)


def test_where_nothing_is_prefetched_no_share_of_it_is_given(without: Row) -> None:
    figures = without.figures()
    assert figures["useful_share"] is figures["late_share"] is None


def test_sequences_without_a_prefetch_have_no_share_but_break_nothing(ahead: Row) -> None:
    shares_SC = ahead.outcome.shares_SC.copy()
    columns = [list(ahead.outcome.totals).index(name) for name in ("prefetched", "useful", "late")]
    shares_SC[:-1, columns] = 0  # all but one sequence: many a resample has none
    lonely = Outcome({**ahead.outcome.totals}, shares_SC, 0, 1)
    figures = Row.of("perfect", "lru", lonely, resamples=200, seed=0).figures()
    assert figures["useful_share"]["low"] == 0
    assert np.isfinite(list(figures["useful_share"].values())).all()


def test_the_table_shows_every_figure_and_parts_the_prefetchers(ahead: Row, without: Row) -> None:
    rows = [without, replace(without, policy="lfu"), ahead]
    lines = format_rows([row.figures() | {"over_caching": row.faster_than(without)} for row in rows]).splitlines()
    assert [line[:7].strip() for line in lines] == ["prefetc", "-------", "none", "none", "", "perfect"]
    speed, gain = ahead.figures()["tokens_per_s"], ahead.faster_than(without)
    figures = ahead.figures()
    assert lines[5].split() == [
        "perfect",
        "lru",
        f"{speed['value']:.2f}",
        f"[{speed['low']:.2f},",
        f"{speed['high']:.2f}]",
        f"{figures['waiting_ms_per_token']['value']:.2f}",
        f"{figures['hit_rate']['value']:.3f}",
        f"{figures['useful_share']['value']:.2f}",
        f"{figures['late_share']['value']:.2f}",
        f"{figures['bytes_per_token']['value'] / 1e6:.1f}",
        f"{gain['value']:.3f}",
        f"[{gain['low']:.3f},",
        f"{gain['high']:.3f}]",
    ]
    assert lines[2].endswith("1.000 [1.000, 1.000]")
    assert len(lines[2].split()) == len(lines[5].split()) - 2  # no share of no prefetches
    starts = [line.index("[", line.index("]")) for line in (lines[2], lines[3], lines[5])]
    assert len(set(starts)) == 1
