"""Checks a trace folder against its plan, its manifest and itself, and names every fault with file and remedy.

Nothing is believed that can be recomputed: manifest lines against their digests, files against their sha256 and size,
footers against the plan, pages against their checksums, rows against the planned sequences, values against the spec.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.progress import progress
from traces.manifest import MANIFEST_NAME, ManifestLine, parse_manifest
from traces.plan import PLAN_NAME, SEQUENCES_NAME, Plan, shard_name
from traces.schema import TraceSpec, routing_fault
from traces.shards import ShardFooter, find_shards, first_line, index_shard, list_values, parse_footer, read_row_group
from traces.writer import file_sha256

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
    """Check one entry of `data/`: its kind, its checksum, its content."""
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
        footer = parse_footer(path)
    except ValueError as error:
        yield Fault(path, f"not a sound shard ({error})", COLLECT_AGAIN if line else "move it away")
        return
    if line is None:
        yield Fault(path, "not in the manifest", COLLECT_AGAIN)
    if plan is not None and footer.spec != plan.spec:
        yield Fault(path, f"its footer is of another run (plan {footer.spec.plan_fingerprint})", "move it away")
        return
    try:
        problem = _check_rows(path, footer, plan)
    except ConfigurationError as error:
        problem = str(error).removeprefix(f"{path}: ").partition(";")[0]
    except ExpertSpeculationError as error:
        problem = first_line(error.__cause__ or error)
    if problem:
        yield Fault(path, problem, COLLECT_AGAIN)


def _check_rows(path: Path, footer: ShardFooter, plan: Plan | None) -> str | None:
    """Return the first thing that is wrong with a shard's rows, or None."""
    infos = list(index_shard(path, footer, 0))
    if plan is not None:
        own = plan.sequences.slice(footer.planned.first_sequence, len(infos))
        names = ("dataset", "sequence_key", "num_tokens")
        wanted = zip(*(own[name].to_pylist() for name in names), strict=True)
        for info, planned in zip(infos, wanted, strict=False):
            if (info.dataset, info.sequence_key, info.num_tokens) != planned:
                return f"sequence {info.sequence_id} is not the planned one"
        if footer.planned not in plan.shards:
            return "its range is not a planned one"
    for group in range(footer.metadata.num_row_groups):
        problem = _check_row_group(path, footer, group)
        if problem:
            return f"row group {group}: {problem}"
    return None


def _check_row_group(path: Path, footer: ShardFooter, group: int) -> str | None:
    spec: TraceSpec = footer.spec
    names = ["phase", "token", *spec.widths]
    table = read_row_group(path, group, names, footer.metadata)
    if table["phase"].to_numpy().max() > 1:
        return "a phase that is neither 0 nor 1"
    values = {name: list_values(table[name]).reshape(-1, *shape) for name, shape in spec.shapes.items()}
    for name in ("router_logits", "lookahead_logits"):
        if name in values and not np.isfinite(values[name]).all():
            return f"{name} holds values that are not finite"
    for h in range(1, spec.horizons + 1):
        if values["lookahead_logits"][:, h - 1, :h].any():
            return f"lookahead_logits at horizon {h} are not zero in the layers below {h}, which have no source"
    return routing_fault(spec, values["expert_ids"], values.get("routing_weights"))
