"""`collect` that is interrupted, meets a second writer or a full disk says how to go on, and ends with equal traces."""

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_speculation.command import main
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.reader import TraceDataset
from traces.verify import verify

SECONDS = 120  # after which something that should have happened did not


@pytest.fixture(scope="module")
def arguments(model_dir: Path, texts: Path) -> list[str]:
    """Return a run of many shards and batches: the words after `expert-speculation`, without the folder."""
    words = [
        "collect",
        "--model",
        str(model_dir),
        "--datasets",
        f"prose={texts / 'prose.jsonl'},{texts / 'more.jsonl'}",
    ]
    return [*words, "--target_traces", "240", "--max_length", "40", "--batch_size", "2", "--shard_size_mb", "0.004"]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output_dir", str(run_dir)])
    assert not ended.value.code
    return run_dir


@contextlib.contextmanager
def running(arguments: list[str], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command as a process of its own, and wait until its first shard is finished."""
    command = [sys.executable, "-m", "expert_speculation", *arguments, "--output_dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the bits of sums depend on it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job passes on: ignore it
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while not (run_dir / MANIFEST_NAME).exists() or b"\n" not in (run_dir / MANIFEST_NAME).read_bytes():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
            yield process
        finally:
            process.kill()
            signal.signal(signal.SIGINT, before)


def content(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return all that was traced, in stored order, as values that compare exactly."""
    return [
        tuple(each.tobytes() if isinstance(each, np.ndarray) else each for each in astuple(sequence))
        for sequence in TraceDataset(run_dir).sequences(columns=("weights", "tokens"))
    ]


def finished_files(run_dir: Path) -> dict[str, int]:
    """Return the finished shards with the times at which they were made; there is nothing else of any shard."""
    found = {path.name: path.stat().st_mtime_ns for path in (run_dir / "data").iterdir()}
    assert sorted(found) == sorted(line.shard for line in read_manifest(run_dir))
    assert list((run_dir / ".tmp").iterdir()) == []
    return found


def go_on_and_compare(words: list[Any], run_dir: Path, whole: Path, command: Callable[..., int]) -> None:
    """Run a command that continues a run, and demand that it equals the whole one and that no shard was made twice."""
    before = finished_files(run_dir)
    assert command(*words) == 0
    assert before.items() <= finished_files(run_dir).items()
    assert verify(run_dir) == []
    assert content(run_dir) == content(whole)


def test_sigint_finishes_the_batch_discards_the_shard_and_names_a_command_that_goes_on(
    arguments, whole, tmp_path, command
):
    run_dir = tmp_path / "a run's folder"
    with running(arguments, run_dir) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, said
    notice, last = (line for line in said.splitlines() if line)
    assert notice == "Interrupted: finishing this step first; once more interrupts at once."
    assert last.startswith("Interrupted. Go on with: expert-speculation collect ")
    assert 0 < len(finished_files(run_dir)) < len(finished_files(whole))
    go_on_and_compare(shlex.split(last.partition("expert-speculation ")[2]), run_dir, whole, command)


def test_a_second_writer_is_refused_while_the_first_lives_and_sigterm_ends_that_one_gracefully(
    arguments, whole, tmp_path, command, capsys
):
    run_dir = tmp_path / "run"
    again = [*arguments, "--output_dir", run_dir, "--resume"]
    with running(arguments, run_dir) as process:
        process.send_signal(signal.SIGSTOP)
        assert command(*again) == 2
        assert capsys.readouterr().err == (
            f"Error: {run_dir}: another process is writing this run; wait for it or choose another --output_dir\n"
        )
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, said
    assert said.endswith(" --resume\n")
    go_on_and_compare(again, run_dir, whole, command)


def test_a_full_disk_exits_1_with_the_remedy_and_the_run_goes_on(arguments, tmp_path, command, capsys):
    """A limit of file sizes stands in for the full disk; few shards, so that none of the other files meets it."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    arguments = [*arguments, "--shard_size_mb", "0.1", "--output_dir"]
    assert command(*arguments, whole) == 0
    largest = max(path.stat().st_size for path in (whole / "data").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, limits[1]))
        assert command(*arguments, run_dir) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_refusal(capsys.readouterr().err, run_dir, "File too large")
    go_on_and_compare([*arguments, run_dir, "--resume"], run_dir, whole, command)


def test_a_really_full_disk_likewise(arguments, whole, tmp_path, command, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used // 2}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        assert command(*arguments, "--output_dir", disk / "run") == 1
        check_refusal(capsys.readouterr().err, disk / "run", "No space left on device")
        subprocess.run(["mount", "-o", f"remount,size={2 * used}", str(disk)], check=True)
        go_on_and_compare([*arguments, "--output_dir", disk / "run", "--resume"], disk / "run", whole, command)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def check_refusal(said: str, run_dir: Path, reason: str) -> None:
    assert said == f"Error: {run_dir}: can not be written ({reason}); free disk space and run again with --resume\n"
    finished_files(run_dir)
