"""What tests of several workers share: texts, settings that make several passes, and a hand that strikes in one."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from collection.settings import CollectSettings
from collection.workers.driver import Driver
from traces.manifest import read_manifest
from traces.plan import Plan
from traces.verify import verify


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as a worker does that has one processor: sums depend, in their last bits, on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(
    make_settings: Callable[..., CollectSettings],
    tmp_path: Path,
    make_texts: Callable[..., list[str]],
    write_texts: Callable[..., Path],
) -> Callable[..., CollectSettings]:
    """Return `make(name, **changes)`: settings of a run in that folder, of 18 sequences in several shards."""
    texts = write_texts(tmp_path / "texts.jsonl", make_texts(40, longest=30))

    def make(name: str, **changes: Any) -> CollectSettings:
        wanted: dict[str, Any] = {
            "datasets": str(texts),
            "target_traces": 18,
            "batch_size": 2,
            "shard_size_mb": 0.02,
            "store": ("weights", "logits"),
            "sample_hidden": 0.2,
            "output_dir": tmp_path / name,
        }
        return make_settings(**(wanted | changes))

    return make


def _assert_same_run(one: Path, two: Path) -> None:
    assert verify(one) == verify(two) == []
    assert Plan.load(one).fingerprint == Plan.load(two).fingerprint
    lines = read_manifest(two)
    assert sorted(line.index for line in lines) == list(range(len(Plan.load(one).shards)))
    for line in lines:
        left, right = (pq.ParquetFile(run / "data" / line.shard) for run in (one, two))
        assert left.read().equals(right.read())
        assert left.metadata.metadata == right.metadata.metadata
    assert list((two / ".tmp").iterdir()) == []


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Return the function that compares plans, rows and footers of two runs, and wants the second one tidy."""
    return _assert_same_run


class Hand:
    """Sends `signal`, once, to a worker, or to this process, as soon as a worker has told of more than `after` tokens.

    `counts` are what the workers told of, each with the number of its pass's attempt.
    """

    def __init__(self) -> None:
        self.signal, self.at_driver, self.after = 0, False, 0
        self.struck: list[int] = []
        self.counts: list[tuple[int, int]] = []

    def watch(self, driver: Driver, own: Any, tokens: int) -> None:
        self.counts.append((own.attempts, tokens))
        if self.signal and not self.struck and own.counted > self.after:
            worker = next(number for number, each in driver._running.items() if each is own)
            self.struck.append(os.getpid() if self.at_driver else driver._facts[worker].process)
            os.kill(self.struck[0], self.signal)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    watching = Hand()
    stock = Driver._count

    def count(driver: Driver, own: Any, tokens: int) -> None:
        stock(driver, own, tokens)
        watching.watch(driver, own, tokens)

    monkeypatch.setattr(Driver, "_count", count)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    yield watching
    signal.signal(signal.SIGINT, before)
