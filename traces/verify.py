"""Checks a trace folder against its plan, its manifest and itself, and names every fault with file and remedy.

Nothing is believed that can be recomputed: manifest lines against their digests, files against their sha256 and size,
footers against the plan, pages against their checksums, rows against the planned sequences, values against the spec.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.progress import progress
from traces.checksums import checksums, file_sha256
from traces.index import check_shard
from traces.manifest import MANIFEST_NAME, ManifestLine, parse_manifest
from traces.plan import PLAN_NAME, SEQUENCES_NAME, Plan, shard_name
from traces.schema import routing_fault
from traces.shards import Shard, find_shards, first_line, parse_shard

COLLECT_AGAIN = "restore the file from a copy, or delete it and its manifest line and collect again with --resume"
RESTORE = "restore the file from a copy, or collect again into a new folder"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, where, and what to do about it."""

    path: Path
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


def verify(shard_dir: Path) -> list[Fault]:
    """Return the faults of a run folder or of the run whose `data/` is given; none means all of it is sound.

    Raises ConfigurationError where there is nothing to check: no folder, or neither plan, manifest nor shard in it.
    """
    inside = shard_dir.resolve().name == "data" and not (shard_dir / PLAN_NAME).exists()
    run_dir = shard_dir.resolve().parent if inside else shard_dir
    if not (run_dir / PLAN_NAME).exists() and not (run_dir / MANIFEST_NAME).exists():
        find_shards(shard_dir)
    faults: list[Fault] = []
    plan = None
    try:
        plan = Plan.load(run_dir)
    except ConfigurationError as error:
        path = next(
            run_dir / name for name in (SEQUENCES_NAME, PLAN_NAME) if str(error).startswith(f"{run_dir / name}:")
        )
        problem, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
        faults.append(Fault(path, problem, remedy))
    lines = list(_check_manifest(run_dir, faults))
    faults += _check_ranges(run_dir, lines, plan)
    data = run_dir / "data" if (run_dir / "data").is_dir() else run_dir
    listed = {line.shard: line for line in lines}
    paths = sorted(data.iterdir()) if data != run_dir else sorted(data.glob("*.parquet"))
    for path in progress(paths, description="verifying", unit="file"):
        faults += _check_file(path, listed.get(path.name), plan)
    present = {path.name for path in paths}
    faults += [
        Fault(data / name, "listed in the manifest but missing", RESTORE) for name in listed if name not in present
    ]
    return faults


def _check_manifest(run_dir: Path, faults: list[Fault]) -> Iterator[ManifestLine]:
    """Yield the manifest's sound lines, one per shard, and add what is wrong with it to `faults`."""
    path = run_dir / MANIFEST_NAME
    if not path.exists():
        faults.append(Fault(path, "missing", "collect again with --resume"))
    lines, torn = parse_manifest(run_dir)
    if torn:
        faults.append(
            Fault(path, f"line {len(lines) + 1} is torn", "collect again with --resume, which makes its shard anew")
        )
    seen: set[int] = set()
    for number, line in enumerate(lines, start=1):
        if line is None:
            faults.append(Fault(path, f"line {number} does not match its own digest", RESTORE))
        elif line.shard != shard_name(line.index):
            faults.append(Fault(path, f"line {number} names shard {line.index} {line.shard!r}", RESTORE))
        elif line.index in seen:
            faults.append(Fault(path, f"line {number} lists {line.shard} a second time", RESTORE))
        else:
            seen.add(line.index)
            yield line


def _check_ranges(run_dir: Path, lines: list[ManifestLine], plan: Plan | None) -> Iterator[Fault]:
    """Compare the manifest's shards with the planned ones."""
    if plan is None:
        return
    planned = {shard.index: shard for shard in plan.shards}
    for line in lines:
        shard = planned.pop(line.index, None)
        found = (line.first_sequence, line.stop_sequence, line.tokens)
        if shard is None:
            yield Fault(run_dir / MANIFEST_NAME, f"lists {line.shard}, which is not planned", RESTORE)
        elif found != (shard.first_sequence, shard.stop_sequence, shard.num_tokens):
            yield Fault(run_dir / MANIFEST_NAME, f"gives {line.shard} a range that is not the planned one", RESTORE)
    for shard in planned.values():
        yield Fault(run_dir / "data" / shard.name, "planned, but not in the manifest", "collect again with --resume")


def _check_file(path: Path, line: ManifestLine | None, plan: Plan | None) -> Iterator[Fault]:
    """Check one entry of `data/`: its kind, its checksums, its content."""
    if path.is_symlink() or not path.is_file():
        yield Fault(path, "not a plain file", "move it away: only shards belong in this folder")
        return
    if line is not None and path.stat().st_size != line.bytes:
        yield Fault(path, f"has {path.stat().st_size} bytes, its manifest line says {line.bytes}", COLLECT_AGAIN)
        return
    if line is not None and file_sha256(path) != line.sha256:
        yield Fault(path, "sha256 differs from its manifest line", COLLECT_AGAIN)
        return
    try:
        shard = parse_shard(path)
    except ValueError as error:
        yield Fault(path, f"not a sound shard ({error})", COLLECT_AGAIN if line else "move it away")
        return
    if line is None:
        yield Fault(path, "not in the manifest", COLLECT_AGAIN)
    elif any(getattr(line, name) != value for name, value in checksums(path)._asdict().items()):
        yield Fault(path, "the checksums of its parts differ from its manifest line", COLLECT_AGAIN)
        return
    if plan is not None and shard.spec != plan.spec:
        yield Fault(path, f"its footer is of another run (plan {shard.spec.plan_fingerprint})", "move it away")
        return
    try:
        problem = _check_rows(shard, plan)
    except ConfigurationError as error:
        problem = str(error).removeprefix(f"{path}: ").partition(";")[0]
    except ExpertSpeculationError as error:
        problem = first_line(error.__cause__ or error)
    if problem:
        yield Fault(path, problem, COLLECT_AGAIN)


def _check_rows(shard: Shard, plan: Plan | None) -> str | None:
    """Return the first thing that is wrong with a shard's rows, or None."""
    if plan is not None and shard.planned not in plan.shards:
        return "its range is not a planned one"
    done = shard.planned.first_sequence
    for group, found in enumerate(check_shard(shard)):
        count = len(found["num_tokens"])
        if plan is not None:
            problem = _check_names(shard, group, found, plan.sequences.slice(done, count))
            if problem:
                return problem
        done += count
        problem = _check_values(shard, group)
        if problem:
            return f"row group {group}: {problem}"
    return None


def _check_names(shard: Shard, group: int, found: dict[str, Any], planned: pa.Table) -> str | None:
    """Compare a row group's sequences with the planned ones."""
    table = shard.table(group, ["dataset", "sequence_key"]).take(pa.array(found["row_offset"]))
    names = ("dataset", "sequence_key")
    own = zip(*(table[name].to_pylist() for name in names), found["num_tokens"].tolist(), strict=True)
    wanted = zip(*(planned[name].to_pylist() for name in (*names, "num_tokens")), strict=True)
    for number, (have, want) in enumerate(zip(own, wanted, strict=True)):
        if have != want:
            return f"sequence {found['sequence_id'][number]} is not the planned one"
    return None


def _check_values(shard: Shard, group: int) -> str | None:
    """Check what the columns of a row group hold, and that Arrow decodes the same lists as `pages` does."""
    spec = shard.spec
    if shard.table(group, ["phase", "token"])["phase"].to_numpy().max() > 1:
        return "a phase that is neither 0 nor 1"
    values = shard.lists(group, list(spec.shapes))
    for name, array in values.items():
        column = shard.arrow_table(group, [name])[name].combine_chunks()
        if not np.array_equal(column.flatten().to_numpy(zero_copy_only=True), array.reshape(-1), equal_nan=True):
            return f"{name} reads differently through Arrow"
    for name in ("router_logits", "lookahead_logits"):
        if name in values and not np.isfinite(values[name]).all():
            return f"{name} holds values that are not finite"
    for h in range(1, spec.horizons + 1):
        if values["lookahead_logits"][:, h - 1, :h].any():
            return f"lookahead_logits at horizon {h} are not zero in the layers below {h}, which have no source"
    return routing_fault(spec, values["expert_ids"], values.get("routing_weights"))
