"""Experts that are neither on the GPU nor in RAM: read from the disk, 3000 ns, then transferred, 1000 ns."""

from collections.abc import Callable

import numpy as np
import pytest

from groundwork.errors import ConfigurationError
from prefetch.simulation import Simulation
from prefetch.timing import Timing
from prefetch.workload import Workload

Make = Callable[..., Workload]
Machine = Callable[..., Timing]


def test_what_is_in_neither_memory_is_read_and_then_transferred(make_workload: Make, make_timing: Machine) -> None:
    one = make_workload(np.arange(8)[:, None, None], 8)
    outcome = Simulation(one, make_timing(), 1, ram_experts=3).run("lru")
    assert outcome.totals["disk_reads"] == 8
    assert outcome.total_ns == 8 * (150 + 3000 + 1000)
    two = make_workload(np.arange(8).reshape(4, 1, 2), 8)
    outcome = Simulation(two, make_timing(), 2, ram_experts=4).run("lru")
    assert outcome.total_ns == 4 * (160 + 2 * 3000 + 1000)  # the first is transferred while the second is read
    assert outcome.totals["disk_ns"] == 8 * 3000


def test_ram_is_read_into_once_for_experts_that_stay_there(make_workload: Make, make_timing: Machine) -> None:
    workload = make_workload((np.arange(40) % 4)[:, None, None], 8)
    outcome = Simulation(workload, make_timing(), 1, ram_experts=4).run("lru")
    assert (outcome.totals["disk_reads"], outcome.totals["demanded"]) == (4, 40)
    one_less = Simulation(workload, make_timing(), 1, ram_experts=3).run("lru")
    assert one_less.totals["disk_reads"] == 40


def test_ram_starts_with_the_experts_used_most(cycling: Make, make_timing: Machine) -> None:
    rate_LE = np.array([[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1]])
    simulation = Simulation(cycling(8, 8), make_timing(), 1, rate_LE, ram_experts=4)
    outcome = simulation.run("lru")
    assert (outcome.totals["disk_reads"], outcome.totals["demanded"]) == (4, 7)
    assert outcome.totals["waiting_ns"] == 7 * 1000 + 4 * 3000


def test_ram_for_all_experts_is_no_second_tier(random_workload: Make, make_timing: Machine) -> None:
    simulation = Simulation(random_workload([30]), make_timing(experts=6), 6)
    everything = simulation.changed(ram_experts=18).run("lru")
    assert everything.totals == simulation.run("lru").totals
    assert everything.totals["disk_reads"] == 0


def test_too_little_ram_is_refused(random_workload: Make, make_timing: Machine) -> None:
    with pytest.raises(ConfigurationError, match=r"--ram_experts 3: RAM has to hold .*; give at least 4 of the 18"):
        Simulation(random_workload([9]), make_timing(experts=6), 6, ram_experts=3)
