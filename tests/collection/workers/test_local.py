"""Several processes of one machine write what one process writes, also where one of them is killed in the middle."""

import signal
from collections.abc import Callable
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


def test_a_worker_that_is_killed_in_a_shard_is_started_again_and_the_run_is_as_if_it_had_not_been(
    settings: Make, assert_same_run: Same, hand: Hand, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = collect(settings("whole")).run_dir
    hand.signal = signal.SIGKILL
    result = collect(settings("two", device="cpu,cpu"))
    assert_same_run(whole, result.run_dir)
    assert len(read_manifest(result.run_dir)) > 3
    assert "on cpu: ended with signal 9, and is started again" in capfd.readouterr().err


def test_what_a_killed_worker_had_streamed_is_taken_up_at_the_layer_under_way(
    settings: Make, assert_same_run: Same, hand: Hand
) -> None:
    wanted = {"execution": "streamed", "memory_budget_gb": 0.0}
    whole = collect(settings("whole", **wanted)).run_dir
    tokens = sum(line.tokens for line in read_manifest(whole))
    hand.signal, hand.after = signal.SIGKILL, tokens  # each of two passes holds half of them, in four layers
    run_dir = collect(settings("two", device="cpu,cpu", **wanted)).run_dir
    assert_same_run(whole, run_dir)
    assert hand.struck
    taken_up = [count for attempt, count in hand.counts if attempt == 2 and count > 0]
    assert taken_up[0] >= tokens // 3, "the second attempt began anew"


def test_an_interrupted_run_is_continued_in_one_process(settings: Make, assert_same_run: Same, hand: Hand) -> None:
    whole = collect(settings("whole")).run_dir
    hand.signal, hand.at_driver = signal.SIGINT, True
    begun = settings("two", device="cpu,cpu")
    with pytest.raises(KeyboardInterrupt):
        collect(begun)
    run_dir = whole.with_name("two")
    assert len(read_manifest(run_dir)) < len(read_manifest(whole))
    collect(replace(begun, device="cpu", resume=True))
    assert_same_run(whole, run_dir)


def test_a_batch_can_not_be_probed_for_several_devices(settings: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"^--batch_size auto: probes one device"):
        collect(settings("two", device="cpu,cpu", batch_size="auto", batch_tokens=None))
