"""A cluster of two workers writes what one process writes, also where one of them is killed in the middle."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

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
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, address="local")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_in_a_pass_is_started_again_and_the_run_is_as_if_it_had_not_been(
    settings: Make, assert_same_run: Same, hand: Hand, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = {"execution": "streamed", "memory_budget_gb": 0.0}
    whole = collect(settings("whole", **wanted)).run_dir
    tokens = sum(line.tokens for line in read_manifest(whole))
    hand.signal = signal.SIGKILL
    result = collect(settings("cluster", engine="ray", workers=2, **wanted))
    assert_same_run(whole, result.run_dir)
    assert f"process {hand.struck[0]}: ended with Actor" in capfd.readouterr().err
    assert sum(count for _, count in hand.counts) == 4 * tokens, "the bar did not end at the run's tokens and layers"


@pytest.mark.usefixtures("cluster")
def test_an_interrupted_run_is_continued_without_the_cluster(settings: Make, assert_same_run: Same, hand: Hand) -> None:
    whole = collect(settings("whole")).run_dir
    hand.signal, hand.at_driver = signal.SIGINT, True
    begun = settings("cluster", engine="ray", workers=2)
    with pytest.raises(KeyboardInterrupt):
        collect(begun)
    run_dir = whole.with_name("cluster")
    assert read_manifest(run_dir) != []
    collect(replace(begun, engine="local", resume=True))
    assert_same_run(whole, run_dir)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_the_cluster_has_processors_are_refused(settings: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"^--workers 3: the Ray cluster has 2 processors"):
        collect(settings("cluster", engine="ray", workers=3))


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
