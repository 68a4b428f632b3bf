"""The run's folder before work starts: is it free or to be resumed, is there space, and what is already done."""

import shutil
from pathlib import Path

from groundwork.atomic import write_bytes
from groundwork.errors import ConfigurationError
from groundwork.progress import log
from traces.manifest import MANIFEST_NAME, ManifestLine, read_manifest
from traces.plan import PLAN_NAME, SEQUENCES_NAME, Plan, PlannedShard, estimated_bytes_per_token
from traces.writer import file_sha256

SPARE_SPACE = 1.2  # sizes are estimates: this many times the estimate must be free
LEFTOVERS = {".lock", ".tmp"}  # of a run that was stopped before it had a plan


def check_folder(run_dir: Path, *, resume: bool) -> None:
    """Raise ConfigurationError unless the folder is empty, or holds a run that is to be resumed."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigurationError(f"{run_dir}: is a file; name a folder with --output_dir")
    found = {each.name for each in run_dir.iterdir()} if run_dir.exists() else set()
    found -= LEFTOVERS | {name for name in found if name.startswith(f".{PLAN_NAME}.") and name.endswith(".tmp")}
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
    existing = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    missing = [shard for shard in plan.shards if not (run_dir / "data" / shard.name).exists()]
    needed = SPARE_SPACE * estimated_bytes_per_token(plan.spec) * sum(shard.num_tokens for shard in missing)
    if needed > free:
        raise ConfigurationError(
            f"{run_dir}: about {needed / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free; free some, "
            "choose another --output_dir, or lower --target_traces"
        )


def begin(run_dir: Path, plan: Plan, *, resume: bool) -> tuple[Plan, set[int]]:
    """Save the plan, or take up the saved one; returns it and the shards that are finished.

    A listed shard whose file is missing or changed is struck from the manifest and made again. Raises
    ConfigurationError where the saved plan is of other settings.
    """
    check_folder(run_dir, resume=resume)  # again: another process may have been faster
    if not (run_dir / PLAN_NAME).exists():
        plan.save(run_dir)
        return plan, set()
    saved = Plan.load(run_dir)
    if saved.fingerprint != plan.fingerprint:
        raise ConfigurationError(
            f"{run_dir}: --resume continues a run with unchanged settings only, and {differing_fields(saved, plan)}; "
            "restore them or choose another --output_dir"
        )
    lines = read_manifest(run_dir)
    sound = [line for line in lines if _is_sound(run_dir, line, saved.shards)]
    if len(sound) < len(lines):
        log(f"{run_dir}: {len(lines) - len(sound)} listed shards are missing or changed and are made again")
        write_bytes(run_dir / MANIFEST_NAME, b"".join(line.render() for line in sound))
    return saved, {line.index for line in sound}


def differing_fields(old: Plan, new: Plan) -> str:
    """Return the fields in which two plans differ, with both values; every difference of the fingerprint is named."""
    names = [name for name in {**old.settings, **new.settings} if old.settings.get(name) != new.settings.get(name)]
    return (
        "; ".join(f"{name} was {old.settings.get(name)!r}, is {new.settings.get(name)!r}" for name in names)
        or "the cut into shards and batches, made by another version of this program"
    )


def _is_sound(run_dir: Path, line: ManifestLine, shards: list[PlannedShard]) -> bool:
    if line.index >= len(shards) or line.shard != shards[line.index].name:
        return False
    path = run_dir / "data" / line.shard
    return path.is_file() and file_sha256(path) == line.sha256
