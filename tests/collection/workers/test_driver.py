"""What the driver does about workers that differ, keep ending, or fail: told by scripts that stand in for processes."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from collection.workers.driver import MOST_ATTEMPTS, Driver, witness
from collection.workers.events import Event, Facts, Failed, Lost, Ready, Task
from collection.workers.worker import PassWorker
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.provenance import library_versions
from traces.plan import SEQUENCES_SCHEMA, Plan, PlannedShard
from traces.schema import TraceSpec


class Scripted:
    """Workers that are there at once, and answer each pass with what `answer` says."""

    def __init__(self, facts: list[Facts], answer: Callable[[int], Event] | None = None) -> None:
        self.names = [f"worker {number}" for number in range(len(facts))]
        self._answer = answer
        self._told: list[tuple[int, Event]] = [(number, Ready(each)) for number, each in enumerate(facts)]
        self.facts, self.handed = facts, [0] * len(facts)

    def hand(self, worker: int, task: Task) -> None:
        assert self._answer is not None
        self.handed[worker] += 1
        event = self._answer(self.handed[worker])
        self._told.append((worker, event))
        if isinstance(event, Lost) and event.restarting:
            self._told.append((worker, Ready(self.facts[worker])))

    def stop(self) -> None:
        pass

    def events(self, seconds: float) -> Iterator[tuple[int, Event]]:
        told, self._told = self._told, []
        yield from told


@pytest.fixture
def facts() -> Facts:
    spec = TraceSpec(
        model_name="m",
        num_layers=2,
        num_experts=4,
        top_k=1,
        moe_layers=(0, 1),
        expert_order="weight",
        quantization="none",
        model_dtype="float32",
        router_dtype="float32",
        library_versions=library_versions(),
        plan_fingerprint="f",
    )
    return Facts(spec, {"model_weights": "abc"}, 1, "CPU", "here", 1)


def plan_of(facts: Facts) -> Plan:
    values = (0, "d", "0", 0, 5, 0, 0)
    columns = {name: [value] for name, value in zip(SEQUENCES_SCHEMA.names, values, strict=True)}
    table = pa.table(columns, schema=SEQUENCES_SCHEMA)
    return Plan("f", facts.spec, {}, [], [PlannedShard(0, 0, 1, 5)], table)


def test_a_pass_that_keeps_ending_its_worker_is_given_up(facts: Facts, tmp_path: Path) -> None:
    workers = Scripted([facts], lambda count: Lost("signal 9", True))
    with pytest.raises(ExpertSpeculationError, match=r": shards 0 ended their worker 3 times, the last with signal 9;"):
        Driver(workers).write_shards(tmp_path, plan_of(facts), set(), None)
    assert workers.handed == [MOST_ATTEMPTS]


def test_a_run_whose_workers_have_all_ended_for_good_says_so(facts: Facts, tmp_path: Path) -> None:
    workers = Scripted([facts, facts], lambda count: Lost("signal 11", False))
    with pytest.raises(ExpertSpeculationError, match=r"^all workers have ended, the last with signal 11;"):
        Driver(workers).write_shards(tmp_path, plan_of(facts), set(), None)
    assert workers.handed == [1, 1]


@pytest.mark.parametrize(("is_configuration", "kind"), [(True, ConfigurationError), (False, ExpertSpeculationError)])
def test_a_workers_error_is_the_runs_error(
    facts: Facts, tmp_path: Path, is_configuration: bool, kind: type[Exception]
) -> None:
    workers = Scripted([facts], lambda count: Failed("sequence 7 does not fit", is_configuration))
    with pytest.raises(kind, match=r"^sequence 7 does not fit$") as raised:
        Driver(workers).write_shards(tmp_path, plan_of(facts), set(), None)
    assert type(raised.value) is kind


def test_workers_with_other_weights_or_libraries_are_refused(facts: Facts) -> None:
    other = dataclasses.replace(facts, identity={"model_weights": "other"})
    with pytest.raises(ConfigurationError, match=r"^worker 1: differs from the first worker in model_weights;"):
        Driver(Scripted([facts, other])).facts()
    versions = facts.spec.library_versions | {"torch": "1.0"}
    older = dataclasses.replace(facts, spec=dataclasses.replace(facts.spec, library_versions=versions))
    with pytest.raises(ConfigurationError, match=r"^worker 0: has torch 1\.0, and this process 2"):
        Driver(Scripted([older])).facts()


def test_a_worker_that_does_not_see_the_runs_folder_refuses(tmp_path: Path) -> None:
    with witness(tmp_path / "run") as path:
        assert path.exists()
        unseen = tmp_path / "elsewhere" / ".tmp" / path.name
        with pytest.raises(ConfigurationError, match=r"elsewhere: is not the same folder for the workers"):
            PassWorker(None, None, unseen).__enter__()  # type: ignore[arg-type]
    assert not path.exists()
