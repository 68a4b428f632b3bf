"""Checks a trace folder against its plan, its manifest and itself, and names every fault with file and remedy.

Nothing is believed that can be recomputed: plan and manifest lines against their digests, files against their size and
sha256, footers against the plan, column chunks and pages against their checksums, rows against the planned sequences,
values against the spec, the card against its seal. No content makes it stop: it goes on after each fault.
"""

import os
import re
from dataclasses import astuple, dataclass, field
from pathlib import Path

from groundwork.progress import progress
from traces.card import CARD_NAME, card_fault
from traces.faults import MOVE_AWAY, REPAIR, RESUME, Fault, FaultError, unread
from traces.manifest import MANIFEST_NAME, ManifestLine, line_fault, parse_manifest, range_of
from traces.plan import PLAN_NAME, SEQUENCES_NAME, Plan
from traces.shard_check import shard_fault
from traces.shards import find_shards, parse_shard

_SHARD_NAME = re.compile(r"train-\d{5,}\.parquet")


@dataclass
class Findings:
    """What was found in a folder; `repair` works from it.

    `lines` are the manifest's sound and planned lines, one a shard, in order. `entries` holds all that is in `data/`,
    with what is wrong with it (None: nothing); what is sound but not listed is in `unlisted`.
    """

    run_dir: Path
    data: Path
    is_run: bool  # False: bare shards, with neither plan nor manifest
    plan: Plan | None = None
    has_manifest: bool = False  # one that can be read, whatever is wrong with its lines
    lines: list[ManifestLine] = field(default_factory=list)
    entries: dict[Path, Fault | None] = field(default_factory=dict)
    unlisted: list[Path] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def verify(shard_dir: Path) -> list[Fault]:
    """Return the faults of a run folder, of the run whose `data/` is given, or of bare shards; none: all is sound.

    Raises ConfigurationError where there is nothing to check: no folder, or neither plan, manifest nor shard in it, or
    a `data/` that is a link or can not be read.
    """
    return examine(shard_dir).faults


def examine(shard_dir: Path) -> Findings:
    """Check everything in a folder; raises as `verify` does."""
    found = locate(shard_dir)
    if found.is_run:
        try:
            found.plan = Plan.load(found.run_dir)
        except FaultError as error:
            found.faults.append(error.fault)
        whole = _check_manifest(found)
        _check_files(found)
        _check_complete(found, whole)
    else:
        _check_files(found)
    return found


def locate(shard_dir: Path) -> Findings:
    """Return what was named, unchecked; raises as `verify` does.

    A link in a run folder is not followed, for it leads out of it.
    """
    real = Path(os.path.realpath(shard_dir))
    run_dir = real.parent if real.name == "data" and _is_run(real.parent) else shard_dir
    data = run_dir / "data"
    if _is_run(run_dir):
        if data.is_symlink():
            raise FaultError(Fault(data, "a link, wanted the folder itself", "move the folder here"))
        return Findings(run_dir, data, is_run=True)
    folder = find_shards(shard_dir)[0].parent
    return Findings(folder, folder, is_run=False)


def _is_run(folder: Path) -> bool:
    paths = [folder / name for name in (PLAN_NAME, SEQUENCES_NAME, MANIFEST_NAME)]
    return any(path.is_symlink() or path.exists() for path in paths)


def _check_manifest(found: Findings) -> bool:
    """Collect the manifest's sound lines, one a shard; returns whether all of it is sound."""
    path = found.run_dir / MANIFEST_NAME
    before = len(found.faults)
    try:
        lines, torn = parse_manifest(found.run_dir)
    except FaultError as error:
        found.faults.append(error.fault)
        return False
    found.has_manifest = path.exists()
    if not found.has_manifest and any(found.data.glob("*.parquet")):
        found.faults.append(Fault(path, "missing", f"{REPAIR}, which rebuilds it from the shards"))
    if torn:
        found.faults.append(Fault(path, f"line {len(lines) + 1} is torn", f"{RESUME}, or {REPAIR}"))
    seen: set[int] = set()
    for number, line in enumerate(lines, start=1):
        problem = None if line is None else _line_problem(line, found.plan, seen)
        if line is None:
            found.faults.append(line_fault(found.run_dir, number))
        elif problem:
            found.faults.append(Fault(path, f"line {number} {problem}", REPAIR))
        else:
            seen.add(line.index)
            found.lines.append(line)
    return len(found.faults) == before


def _line_problem(line: ManifestLine, plan: Plan | None, seen: set[int]) -> str | None:
    if line.index in seen:
        return f"lists {line.shard} a second time"
    if plan is None:
        return None
    if line.index >= len(plan.shards):
        return f"lists {line.shard}, which is not planned"
    fits = range_of(line) == astuple(plan.shards[line.index])
    return None if fits else f"gives {line.shard} a range that is not the planned one"


def _check_files(found: Findings) -> None:
    """Check all that is in `data/`, or the shards of a bare folder."""
    listed = {line.shard: line for line in found.lines}
    first = None
    for path in progress(_paths(found), description="verifying", unit="file"):
        if found.is_run and not _SHARD_NAME.fullmatch(path.name):
            fault: Fault | None = Fault(path, "no shard, and nothing else belongs in data/", MOVE_AWAY)
        else:
            fault = shard_fault(path, listed.get(path.name), found.plan)
        if fault is None and found.plan is None:
            first = first or path
            if parse_shard(path).spec != parse_shard(first).spec:
                fault = Fault(path, f"its footer is of another run than that of {first.name}", MOVE_AWAY)
        found.entries[path] = fault
        if fault is not None:
            found.faults.append(fault)
        elif found.is_run and path.name not in listed:
            found.unlisted.append(path)
    if found.has_manifest:
        found.faults += [Fault(path, "not in the manifest", f"{REPAIR}, which lists it") for path in found.unlisted]
    found.faults += [
        Fault(found.data / name, "missing, but the manifest lists it", f"restore it from a copy, or {RESUME}")
        for name in listed
        if found.data / name not in found.entries
    ]


def _paths(found: Findings) -> list[Path]:
    """Return what is to be checked: nothing but shards belongs in `data/`; a bare folder may hold other things."""
    try:
        return sorted(found.data.iterdir() if found.is_run else found.data.glob("*.parquet"))
    except FileNotFoundError:
        return []  # nothing was written yet, or every listed shard is missing
    except OSError as error:
        raise FaultError(unread(found.data, error)) from error


def _check_complete(found: Findings, manifest_is_sound: bool) -> None:
    """Say whether the run is unfinished, and check the card, its counts only where all else is sound."""
    planned = [shard.name for shard in found.plan.shards] if found.plan is not None else []
    there = {path.name for path in found.entries} | {line.shard for line in found.lines}
    missing = sum(name not in there for name in planned)
    if missing:
        problem = f"{missing} of {len(planned)} planned shards are not there yet"
        found.faults.append(Fault(found.run_dir, problem, RESUME))
        if not (found.run_dir / CARD_NAME).exists():
            return  # it is written last
    counted = manifest_is_sound and not found.unlisted and not missing
    fault = card_fault(found.run_dir, found.plan, found.lines if counted else None)
    if fault is not None:
        found.faults.append(fault)
