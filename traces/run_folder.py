"""The run's folder around the work: is it free or to be resumed, is there space, what is done, and who writes there.

A killed run may leave its lock file, an unfinished shard in `.tmp/` and the temporary file of an atomic write. None of
them is taken for content, and resuming removes them.
"""

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from groundwork.atomic import write_bytes
from groundwork.disk import free_bytes, saying_disk_full
from groundwork.errors import ConfigurationError
from groundwork.progress import log
from traces.card import CARD_NAME
from traces.manifest import MANIFEST_NAME, ManifestLine, read_manifest
from traces.plan import PLAN_NAME, SEQUENCES_NAME, Plan, PlannedShard, estimated_bytes_per_token
from traces.writer import file_sha256, lock_run

FREE_AND_RESUME = "free disk space and run again with --resume"
# Of a plan's settings: what may change, for it changes no output, and what no option sets but follows from others.
_FREE = {"execution"}
_FOLLOWING = {"model_config", "model_weights", "tokenizer", "experts_implementation", "bitsandbytes"}
SPARE_SPACE = 1.2  # sizes are estimates: this many times the estimate must be free


def check_folder(run_dir: Path, *, resume: bool) -> None:
    """Raise ConfigurationError unless the folder is empty, or holds a run that is to be resumed."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigurationError(f"{run_dir}: is a file; name a folder with --output_dir")
    found = {each.name for each in run_dir.iterdir()} if run_dir.exists() else set()
    found -= {".lock", ".tmp", *(each.name for each in _torn_files(run_dir))}
    if not found:
        return
    if not resume:
        raise ConfigurationError(
            f"{run_dir}: is not empty; continue its run with --resume, or choose another --output_dir"
        )
    if PLAN_NAME not in found and found != {SEQUENCES_NAME}:  # the table is written before the plan
        raise ConfigurationError(f"{run_dir}: holds no {PLAN_NAME} to resume; choose an empty --output_dir")


def check_free_space(run_dir: Path, plan: Plan) -> None:
    """Raise ConfigurationError unless the shards that are not there yet will fit on the disk."""
    free = free_bytes(run_dir)
    missing = [shard for shard in plan.shards if not (run_dir / "data" / shard.name).exists()]
    needed = SPARE_SPACE * estimated_bytes_per_token(plan.spec) * sum(shard.num_tokens for shard in missing)
    if needed > free:
        raise ConfigurationError(
            f"{run_dir}: about {needed / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free; free some, "
            "choose another --output_dir, or lower --target_traces"
        )


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Hold the folder as its only writer, and say in one sentence what to do when the disk is full.

    What killed commands have left there to be known by (`witness_path`) is removed first: nobody else writes now.
    Raises ConfigurationError where another process holds it, ExpertSpeculationError where anything that is written
    within meets a full disk: plan, shard, manifest or card.
    """
    with lock_run(run_dir), saying_disk_full(run_dir, FREE_AND_RESUME):
        for stale in run_dir.glob(".tmp/witness-*"):
            stale.unlink()
        yield


def witness_path(run_dir: Path) -> Path:
    """Return a new file's path, by which processes elsewhere see that they have the same folder as the one that holds
    it, and puts the file there and takes it away again.
    """
    return run_dir / ".tmp" / f"witness-{uuid.uuid4().hex}"


def begin(run_dir: Path, plan: Plan, *, resume: bool) -> tuple[Plan, set[int]]:
    """Save the plan, or take up the saved one; returns it and the shards that are finished.

    A listed shard whose file is missing or changed is struck from the manifest and made again. The caller holds the
    folder. Raises ConfigurationError where the saved plan is of other settings.
    """
    check_folder(run_dir, resume=resume)  # again: another process may have been faster
    for leftover in [*_torn_files(run_dir), *run_dir.glob(".tmp/*.parquet")]:
        leftover.unlink()
    if not (run_dir / PLAN_NAME).exists():
        plan.save(run_dir)
        return plan, set()
    saved = Plan.load(run_dir)
    if saved.fingerprint != plan.fingerprint:
        refuse_changes(run_dir, saved, plan.settings)
        raise ConfigurationError(
            f"{run_dir}: the run was cut into other shards and batches, by another version of this program; choose "
            "another --output_dir"
        )
    lines = read_manifest(run_dir)
    sound = [line for line in lines if _is_sound(run_dir, line, saved.shards)]
    if len(sound) < len(lines):
        log(f"{run_dir}: {len(lines) - len(sound)} listed shards are missing or changed and are made again")
        write_bytes(run_dir / MANIFEST_NAME, b"".join(line.render() for line in sound))
    return saved, {line.index for line in sound}


def refuse_changes(run_dir: Path, saved: Plan, settings: Mapping[str, Any]) -> None:
    """Raise ConfigurationError, naming the fields, where any of `settings` differs from the saved plan's.

    What follows from other settings is named only where nothing else differs, and what changes no output never.
    """
    differing = [name for name in settings if name not in _FREE and saved.settings.get(name) != settings[name]]
    names = [name for name in differing if name not in _FOLLOWING] or differing
    if names:
        changes = "; ".join(f"{name} was {saved.settings.get(name)!r}, is {settings[name]!r}" for name in names)
        raise ConfigurationError(
            f"{run_dir}: --resume continues a run with unchanged settings only, and {changes}; "
            "restore them or choose another --output_dir"
        )


def _torn_files(run_dir: Path) -> list[Path]:
    """Return what kills have left of atomic writes."""
    names = (PLAN_NAME, SEQUENCES_NAME, MANIFEST_NAME, CARD_NAME)
    return [path for name in names for path in run_dir.glob(f".{name}.*.tmp")]


def _is_sound(run_dir: Path, line: ManifestLine, shards: list[PlannedShard]) -> bool:
    if line.index >= len(shards) or line.shard != shards[line.index].name:
        return False
    path = run_dir / "data" / line.shard
    return path.is_file() and file_sha256(path) == line.sha256
