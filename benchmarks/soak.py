"""Does a run survive being killed at any time? Kills the whole command at random times and compares what it ends with.

    .venv/bin/python benchmarks/soak.py [--kills 50] [--signals 10] [--seed 0]

Each trial collects from the embedded mini-Mixtral into a folder of its own, is ended by SIGKILL, SIGINT or SIGTERM at a
random time of the run, and is resumed; every third resumed run is ended at random too. At last it must equal a run that
nothing interrupted: same rows, order and values, `verify` finds no fault, and no finished shard was made again. SIGINT
and SIGTERM must exit with 130 and leave nothing but finished shards. Exits 1 on any difference. Times are drawn from
the seed; what a run is doing then depends on the machine. A SIGKILL is not a loss of power: that is not claimed.
"""

import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import click
import numpy as np

from groundwork.progress import log
from traces.manifest import parse_manifest
from traces.plan import PLAN_NAME, Plan
from traces.reader import TraceDataset
from traces.verify import verify

ROOT = Path(__file__).resolve().parents[1]
COLLECT = [
    *(sys.executable, "-m", "expert_speculation", "collect", "--datasets", "installed", "--target_traces", "240"),
    *("--max_length", "128", "--batch_size", "4", "--shard_size_mb", "0.05", "--device", "cpu", "--dtype", "float32"),
]
RESUMED_RUNS_ENDED_TOO = 1 / 3
PHASES = ("before the plan", "between the shards", "after the last shard", "after the card")


@click.command()
@click.option("--kills", default=50, show_default=True, help="Trials that SIGKILL ends.")
@click.option("--signals", default=10, show_default=True, help="Trials that SIGINT ends, and as many for SIGTERM.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output_dir", type=click.Path(path_type=Path), help="Kept; a temporary folder when not given.")
def main(kills: int, signals: int, seed: int, output_dir: Path | None) -> None:
    """Kill and resume collections, and compare each with an uninterrupted one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    with tempfile.TemporaryDirectory() as temporary:
        folder = (output_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise click.UsageError(f"--output_dir {folder}: is not empty; name a new folder")
        for name in ("first", "whole"):  # the first one waits for the disk
            started = time.monotonic()
            assert run(folder / name, None, 0.0) == 0, f"the uninterrupted run failed, see {folder / name}.log"
            seconds = time.monotonic() - started
        whole = content(folder / "whole")
        shards = len(Plan.load(folder / "whole").shards)
        log(f"uninterrupted: {seconds:.1f} s, {len(whole)} sequences, {shards} shards")
        generator = random.Random(seed)
        phases: dict[str, Counter[str]] = {}
        differences = 0
        ends = [signal.SIGKILL] * kills + [signal.SIGINT] * signals + [signal.SIGTERM] * signals
        folders = (folder / f"{number:03d}" for number in itertools.count())
        for number, end in enumerate(ends, start=1):
            history, problems = trial(next(folders), end, generator, seconds, whole)
            while not history and not problems:  # it was done before the signal came
                history, problems = trial(next(folders), end, generator, seconds, whole)
            phases.setdefault(end.name, Counter()).update(history)
            differences += bool(problems)
            log(f"{number}/{len(ends)} {end.name} {', '.join(history)}: {'; '.join(problems) or 'equal'}")
    click.echo(f"{'ended by':<10}{'runs':>6}" + "".join(f"{phase:>24}" for phase in PHASES))
    for name, counts in phases.items():
        click.echo(f"{name:<10}{counts.total():>6}" + "".join(f"{counts[phase]:>24}" for phase in PHASES))
    click.echo(f"{len(ends)} trials resumed to the end, {differences} differ from the uninterrupted run (seed {seed})")
    sys.exit(differences > 0)


def trial(
    run_dir: Path, end: signal.Signals, generator: random.Random, seconds: float, whole: list[tuple[Any, ...]]
) -> tuple[list[str], list[str]]:
    """End a run, and some of its resumptions, then finish it; returns the phases it was ended in, and what is wrong.

    No phases: it was done before the first signal came.
    """
    history: list[str] = []
    problems: list[str] = []
    for attempt in itertools.count():
        finished = finished_files(run_dir)
        ended = attempt == 0 or generator.random() < RESUMED_RUNS_ENDED_TOO
        code = run(run_dir, end if ended else None, generator.uniform(0, seconds))
        now = finished_files(run_dir)
        if not finished.items() <= now.items():
            problems.append("finished shards were made again")
        if code == 0 or not ended:
            break
        history.append(phase_of(run_dir))
        wanted = {-end} if end == signal.SIGKILL else {130} if now else {130, -end}  # handlers come with the program
        if code not in wanted:
            problems.append(f"{end.name} {history[-1]} ended with exit code {code}")
        if code == 130:
            left = {path.name for path in run_dir.glob("data/*")} - now.keys()
            left |= {path.name for path in run_dir.glob(".tmp/*")}
            problems += [f"{end.name} left {name}" for name in sorted(left)]
    if code:
        problems.append(f"the last run ended with exit code {code}")
    else:
        problems += map(str, verify(run_dir))
        problems += ["tables differ"] * (content(run_dir) != whole)
    return history, problems


def run(run_dir: Path, end: signal.Signals | None, after: float) -> int:
    """Collect into the folder, resuming what is there, and send the signal after so many seconds."""
    command = [*COLLECT, "--output_dir", str(run_dir), "--resume"]
    with (
        run_dir.with_suffix(".log").open("a") as output,
        subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            return process.wait(after if end else None)
        except subprocess.TimeoutExpired:
            process.send_signal(end or signal.SIGKILL)
            return process.wait()


def phase_of(run_dir: Path) -> str:
    """Say how far a run has come."""
    if not (run_dir / PLAN_NAME).exists():
        return PHASES[0]
    if len(finished_files(run_dir)) < len(Plan.load(run_dir).shards):
        return PHASES[1]
    return PHASES[3] if (run_dir / "README.md").exists() else PHASES[2]


def finished_files(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Return the listed shards, with what would change if one were made again."""
    lines, _ = parse_manifest(run_dir)
    stats = {line.shard: (run_dir / "data" / line.shard).stat() for line in lines if line}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def content(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return all that was traced, in stored order, as values that compare exactly."""
    return [
        tuple(each.tobytes() if isinstance(each, np.ndarray) else each for each in astuple(sequence))
        for sequence in TraceDataset(run_dir).sequences(columns=("weights", "tokens"))
    ]


if __name__ == "__main__":
    main()
