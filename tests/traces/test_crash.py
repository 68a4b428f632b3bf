"""A run that dies anywhere, or meets a full disk, is continued to exactly what an uninterrupted run gives."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from traces.manifest import MANIFEST_NAME, append_line, read_manifest
from traces.plan import Plan
from traces.reader import TraceDataset
from traces.run_folder import check_folder, witness_path, writing
from traces.verify import verify

HARNESS = Path(__file__).with_name("crash_harness.py")
LENGTHS = (5, 40, 3, 60, 7, 30, 20, 45)
ALL = ("weights", "tokens")


class Fate(NamedTuple):
    """One of the harness's runs: where it was struck, what it said, how it ended."""

    run_dir: Path
    point: str
    message: str
    code: int


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where there is one: thousands of fsyncs wait for nothing there, and prove nothing."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


@pytest.fixture
def meet(folder: Path) -> Callable[[str], list[Fate]]:
    """Return a function that has every run of the harness meet a fate."""

    def run_harness(fate: str) -> list[Fate]:
        command = [sys.executable, str(HARNESS), str(folder), fate]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        return [Fate(folder / name, point, " ".join(said), int(code)) for name, point, *said, code in lines]

    return run_harness


@pytest.fixture
def write(make_spec: Callable, make_sequences: Callable, write_run: Callable) -> Callable[[Path], Plan]:
    """Return a function that writes the harness's run, or what is missing of it."""
    spec = make_spec()
    sequences = make_sequences(spec, LENGTHS)
    return lambda run_dir: write_run(run_dir, spec, sequences, shards=2, row_group_tokens=50)


@pytest.fixture
def whole(folder: Path, write: Callable[[Path], Plan]) -> Path:
    """Return a run that nothing interrupted."""
    write(folder / "whole")
    return folder / "whole"


def content(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return all that was traced, in stored order, as values that compare exactly."""
    return [
        tuple(each.tobytes() if isinstance(each, np.ndarray) else each for each in astuple(sequence))
        for sequence in TraceDataset(run_dir).sequences(columns=ALL)
    ]


def finished_files(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Return the listed shards, with what would change if one were made again."""
    stats = {line.shard: (run_dir / "data" / line.shard).stat() for line in read_manifest(run_dir)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def names(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))


def resume_and_compare(run_dir: Path, whole: Path, write: Callable[[Path], Plan]) -> int:
    """Finish a run and demand that it equals the whole one; returns how many shards were there already."""
    finished = finished_files(run_dir) if run_dir.exists() else {}
    write(run_dir)
    assert verify(run_dir) == []
    assert content(run_dir) == content(whole)
    assert names(run_dir) == names(whole)
    assert finished.items() <= finished_files(run_dir).items()
    return len(finished)


def test_a_run_killed_before_any_file_operation_or_after_the_last_is_continued(meet, whole, write):
    fates = meet("killed")
    assert len(fates) >= 90
    for operation in ("flock", "mkdir", "write", "flush", "fsync", "replace", "truncate", "unlink", "write_table"):
        assert any(fate.point.startswith(operation) for fate in fates), operation
    assert {fate.code for fate in fates} == {-9}
    kept = {resume_and_compare(fate.run_dir, whole, write) for fate in fates}
    assert kept == {0, 1, 2}


def test_a_run_killed_in_the_middle_of_a_write_is_continued(meet, whole, write):
    fates = meet("cut")
    sizes = {path.name: path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    beyond_all = sum(int(fate.point.split()[1]) > max(sizes.values()) for fate in fates)
    assert [fate.code for fate in fates] == [-25] * (len(fates) - beyond_all) + [0] * beyond_all
    assert len(fates) - beyond_all >= 10
    torn = {path.name for fate in fates for path in fate.run_dir.glob(".tmp/*.parquet") if path.stat().st_size}
    assert torn == {"train-00000.parquet", "train-00001.parquet"}
    for fate in fates:
        resume_and_compare(fate.run_dir, whole, write)


def test_a_disk_that_is_full_from_any_write_on_is_named_and_the_run_is_continued(meet, whole, write):
    fates = meet("full")
    assert [fate.code for fate in fates] == [1] * (len(fates) - 1) + [0]
    assert len(fates) >= 15
    for fate in fates:
        assert fate.code == 0 or fate.message == (
            f"{fate.run_dir}: can not be written (File too large); free disk space and run again with --resume"
        )
        assert not [*fate.run_dir.glob(".tmp/*"), *fate.run_dir.glob(".*.tmp")]
        for path in (fate.run_dir / "data").glob("*"):
            assert path.stat().st_size == (whole / "data" / path.name).stat().st_size
        resume_and_compare(fate.run_dir, whole, write)


def test_a_manifest_torn_at_any_byte_of_its_last_line_loses_that_line_only(whole, capsys):
    path = whole / MANIFEST_NAME
    text = path.read_bytes()
    first, second = read_manifest(whole)
    last_line = text.index(b"\n") + 1
    for length in range(last_line, len(text)):
        path.write_bytes(text[:length])
        assert read_manifest(whole) == [first]
        assert ("line 2 is torn" in capsys.readouterr().err) == (length > last_line)
        append_line(whole, second)
        assert path.read_bytes() == text


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_run_with_a_torn_manifest_is_continued(whole, write, folder, kept):
    write(folder / "torn")
    path = folder / "torn" / MANIFEST_NAME
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    assert resume_and_compare(folder / "torn", whole, write) == 1


def test_a_shard_that_is_in_place_but_not_listed_is_made_again(whole, write, folder):
    write(folder / "run")
    (folder / "run" / MANIFEST_NAME).unlink()
    before = (folder / "run" / "data" / "train-00001.parquet").stat().st_ino
    assert resume_and_compare(folder / "run", whole, write) == 0
    assert (folder / "run" / "data" / "train-00001.parquet").stat().st_ino != before


def test_what_a_killed_command_was_known_by_is_removed_by_the_next_writer(folder):
    with writing(folder):
        left = witness_path(folder)
        left.parent.mkdir()
        left.touch()
    with writing(folder):
        assert not left.exists()
        own = witness_path(folder)
        own.touch()
        assert own != left


def test_a_folder_that_holds_leftovers_only_counts_as_empty(whole, write, folder):
    run_dir = folder / "run"
    (run_dir / ".tmp").mkdir(parents=True)
    for name in (".lock", ".plan.parquet.x1.tmp", ".plan.json.x2.tmp", ".tmp/train-00007.parquet"):
        (run_dir / name).write_bytes(b"PAR1")
    check_folder(run_dir, resume=False)
    resume_and_compare(run_dir, whole, write)
