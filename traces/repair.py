"""Mends a run folder as far as its plan and its shards prove what is right.

The manifest is rebuilt: lines that are whole, and whose shards match, stay byte for byte; shards that are sound but not
listed get new lines. What is proven to be wrong is moved to `damaged/`, so that the run can be resumed, and a copy of a
manifest that loses a line is kept there; nothing is deleted. The card is written anew. What can not be mended is
plan.json, whose settings stand nowhere else, and plan.parquet, whose source rows and batches are not in the shards:
without both nothing is touched.

Killed anywhere, nothing is lost and the next repair goes on: shards are moved before the manifest forgets them, so none
of them can be listed again, and files are replaced atomically.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from groundwork.atomic import fsync_folder, write_bytes
from groundwork.errors import ConfigurationError
from traces.card import CARD_LIMIT, CARD_NAME, card_fault, sealed_card
from traces.checksums import checksums
from traces.faults import FaultError, printable, unread
from traces.manifest import MANIFEST_LIMIT, MANIFEST_NAME, ManifestLine
from traces.plain_files import read_plain
from traces.plan import PLAN_NAME, SEQUENCES_NAME
from traces.run_folder import writing
from traces.shards import parse_shard
from traces.verify import Findings, examine, locate

DAMAGED_NAME = "damaged"
REBUILT = "line rebuilt by verify --repair: its checksums are those of the shard as it was found then"


def repair(shard_dir: Path) -> Iterator[str]:
    """Mend a run folder, yielding one sentence for each thing that is done; none means that there was nothing to do.

    Raises ConfigurationError where the folder is no run, has no sound plan, or is being written by another process.
    """
    named = locate(shard_dir)
    run_dir = named.run_dir
    if not named.is_run:
        raise ConfigurationError(f"{run_dir}: holds bare shards, and neither plan nor manifest to repair; verify them")
    with writing(run_dir):
        found = examine(run_dir)
        if found.plan is None:
            raise ConfigurationError(_hopeless(found))
        for name, limit in ((MANIFEST_NAME, MANIFEST_LIMIT), (CARD_NAME, CARD_LIMIT)):
            if not _is_readable(run_dir / name, limit):
                yield _move(run_dir / name, "no plain file, or larger than any of ours")
        for path, fault in found.entries.items():
            if fault is not None and fault.proven:
                yield _move(path, fault.problem)
        lines = [line for line in found.lines if (found.data / line.shard).exists()]
        rebuilt = [_new_line(path) for path in found.unlisted]
        yield from _write_manifest(run_dir, lines, rebuilt)
        if card_fault(run_dir, found.plan, lines + rebuilt) is not None:
            write_bytes(run_dir / CARD_NAME, sealed_card(found.plan, lines + rebuilt))
            yield f"{run_dir / CARD_NAME}: written anew"


def _hopeless(found: Findings) -> str:
    """Say what can and can not be done without a sound plan."""
    fault = next(fault for fault in found.faults if fault.path.name in (PLAN_NAME, SEQUENCES_NAME))
    return printable(
        f"{fault.path}: {fault.problem}, and no other file holds what stands in it; restore it from a copy and repair "
        "then, or copy the shards to a folder of their own, which can be read and verified without a plan"
    )


def _is_readable(path: Path, limit: int) -> bool:
    """Say whether a file may be kept or replaced where it is; raises FaultError where that can not be told."""
    try:
        read_plain(path, limit)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise FaultError(unread(path, error)) from error
    except ValueError:
        return False
    return True


def _move(path: Path, problem: str) -> str:
    run_dir = path.parent.parent if path.parent.name == "data" else path.parent
    target = _free_place(run_dir, path.name)
    os.rename(path, target)  # noqa: PTH104 - of the file itself, be it a link, and never onto another
    fsync_folder(target.parent)
    fsync_folder(path.parent)
    return printable(f"{path}: moved to {target.relative_to(run_dir)} ({problem})")


def _free_place(run_dir: Path, name: str) -> Path:
    """Return a path in `damaged/` that nothing has."""
    folder = run_dir / DAMAGED_NAME
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigurationError(f"{folder}: a link or a file, wanted a folder to move damaged files to; move it away")
    folder.mkdir(exist_ok=True)
    taken = {each.name for each in folder.iterdir()}
    numbered = (f"{name}.{number}" for number in range(1, len(taken) + 2))
    return folder / next(each for each in (name, *numbered) if each not in taken)


def _new_line(path: Path) -> ManifestLine:
    planned = parse_shard(path).planned
    return ManifestLine(
        shard=planned.name,
        index=planned.index,
        first_sequence=planned.first_sequence,
        stop_sequence=planned.stop_sequence,
        sequences=planned.stop_sequence - planned.first_sequence,
        tokens=planned.num_tokens,
        **checksums(path)._asdict(),
        seconds=0.0,
        notes=(REBUILT,),
    )


def _write_manifest(run_dir: Path, kept: list[ManifestLine], rebuilt: list[ManifestLine]) -> Iterator[str]:
    path = run_dir / MANIFEST_NAME
    old = read_plain(path, MANIFEST_LIMIT) if path.exists() else b""
    new = b"".join(line.render() for line in kept + rebuilt)
    if new == old:
        return
    dropped = len(set(old.split(b"\n")) - set(new.split(b"\n")))
    done = f"{len(kept)} lines kept, {len(rebuilt)} rebuilt, {dropped} dropped"
    if dropped:
        copy = _free_place(run_dir, path.name)
        write_bytes(copy, old)
        done += f"; the old one is kept as {copy.relative_to(run_dir)}"
    write_bytes(path, new)
    yield f"{path}: written anew ({done})"
