"""The workers of a cluster write what one process writes, also where one of them is killed in the middle."""

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collection.collector import collect
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from traces.manifest import read_manifest

from .conftest import Hand

Make = Callable[..., CollectSettings]
Same = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed; pip install '.[cluster]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")  # or as many as an actor has processors
        ray.init(num_cpus=2, include_dashboard=False, address="local")
        yield
        ray.shutdown()


@pytest.fixture
def no_spare_processes(cluster: None) -> Iterator[None]:
    """Take the processes that Ray has started beforehand, so that a worker that is killed is a while in coming back."""
    import ray

    takers = [ray.remote(num_cpus=0)(SimpleNamespace).remote() for _ in range(2)]
    ray.get([taker.__ray_ready__.remote() for taker in takers])
    yield
    for taker in takers:
        ray.kill(taker)


RESIDENT: dict[str, Any] = {"execution": "resident"}
STREAMED: dict[str, Any] = {"execution": "streamed", "memory_budget_gb": 0.0}


@pytest.mark.parametrize(
    ("workers", "steps", "wanted"), [(1, 1, RESIDENT), (2, 4, STREAMED)], ids=["alone", "streamed"]
)
@pytest.mark.usefixtures("no_spare_processes")
def test_a_worker_that_is_killed_in_a_pass_is_started_again_and_the_run_is_as_if_it_had_not_been(
    settings: Make,
    assert_same_run: Same,
    hand: Hand,
    capfd: pytest.CaptureFixture[str],
    workers: int,
    steps: int,
    wanted: dict[str, Any],
) -> None:
    whole = collect(settings("whole", **wanted)).run_dir
    tokens = sum(line.tokens for line in read_manifest(whole))
    hand.signal = signal.SIGKILL
    result = collect(settings("cluster", engine="ray", workers=workers, **wanted))
    assert_same_run(whole, result.run_dir)
    told = capfd.readouterr().err
    assert f"process {hand.struck[0]}: ended with Actor" in told
    assert told.count("ended with") == told.count("and is started again") == 1
    assert sum(count for _, count in hand.counts) == steps * tokens, "the bar did not end where the run did"


@pytest.mark.usefixtures("cluster")
def test_an_interrupted_run_is_continued_without_the_cluster(settings: Make, assert_same_run: Same, hand: Hand) -> None:
    whole = collect(settings("whole")).run_dir
    hand.signal, hand.at_driver = signal.SIGINT, True
    begun = settings("cluster", engine="ray", workers=2)
    with pytest.raises(KeyboardInterrupt):
        collect(begun)
    run_dir = whole.with_name("cluster")
    assert read_manifest(run_dir) != []
    collect(replace(begun, engine="local", workers=None, resume=True))
    assert_same_run(whole, run_dir)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_the_cluster_has_processors_are_refused(settings: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"^--workers 3: the Ray cluster has 2 processors"):
        collect(settings("cluster", engine="ray", workers=3))


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `collect` look for the cluster that RAY_ADDRESS names, and not take that of the tests above."""
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: False)


@pytest.mark.usefixtures("unconnected")
def test_an_address_where_nothing_listens_is_refused_at_once(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigurationError, match=rf"^RAY_ADDRESS=127.0.0.1:{port}: nothing answers there \(.*refused"):
        collect(settings("cluster", engine="ray"))


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "somewhere"])
@pytest.mark.usefixtures("unconnected")
def test_what_is_no_host_and_port_is_refused(settings: Make, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigurationError, match=rf"^RAY_ADDRESS={address}: is not HOST:PORT"):
        collect(settings("cluster", engine="ray"))


def test_without_ray_the_sentence_says_how_to_install_it(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"^--engine ray: Ray is not installed; install it with pip"):
        collect(settings("cluster", engine="ray"))


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket/run", "hdfs://name:9000/run"])
def test_object_stores_are_refused(settings: Make, address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is an address, and shards are put in place by renaming"):
        settings("x", output_dir=Path(address))


def test_the_devices_of_a_cluster_are_not_named(settings: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"^--device cpu,cpu: Ray gives each worker its device"):
        collect(settings("x", engine="ray", device="cpu,cpu"))
