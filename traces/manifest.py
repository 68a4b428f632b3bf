"""What a run has done: one JSON line per finished shard in `manifest.jsonl`, each with a digest of itself.

A line is appended and fsync'ed only after its shard is in place, so a shard without a line is simply made again. A last
line that a crash tore off is ignored, and cut away by the next append. Lines are compared as bytes: nothing about a
line can change unnoticed. What is not a line of ours, by its size, types or values, is no line at all.
"""

import builtins
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from groundwork.atomic import fsync_folder
from groundwork.errors import ConfigurationError
from groundwork.progress import log
from traces.faults import REPAIR, Fault, FaultError, unread
from traces.plain_files import read_plain

MANIFEST_NAME = "manifest.jsonl"
MANIFEST_LIMIT = 32 * 2**20  # bytes: the chunks of 20 billion tokens; parsed it takes up to 15 times as much
LINE_LIMIT = 2**20  # bytes: the chunks of half a billion tokens


@dataclass(frozen=True)
class ManifestLine:
    """One finished shard: its file in `data/`, half-open sequence range, size, checksums, and notes on the way.

    `sha256` covers the whole file. `footer_blake2b` and `chunk_crc32` cover parts of it, so that a reader checks just
    the bytes it decodes: the footer, and each column's chunk in each row group.
    """

    shard: str
    index: int
    first_sequence: int
    stop_sequence: int
    sequences: int
    tokens: int  # rows
    bytes: int
    sha256: str
    footer_blake2b: str
    chunk_crc32: tuple[tuple[int, ...], ...]  # [row group][column]
    seconds: float
    notes: tuple[str, ...] = ()

    def render(self) -> builtins.bytes:
        """Return the line as it stands in the file, with its digest and the newline."""
        values = asdict(self)
        return canonical_json(values | {"digest": _digest(values)}) + b"\n"


def shard_name(index: int) -> str:
    """Return the file name of shard `index`; zero-padded, so that names sort as indices up to 99,999."""
    return f"train-{index:05d}.parquet"


def range_of(line: ManifestLine) -> tuple[int, int, int, int]:
    """Return what a line says of its shard's place, as the fields of a `PlannedShard`."""
    return line.index, line.first_sequence, line.stop_sequence, line.tokens


def append_line(run_dir: Path, line: ManifestLine) -> None:
    """Append and fsync one line, first cutting off a torn one; the caller holds the run's lock.

    Raises ConfigurationError where the line is too long to be read back.
    """
    path = run_dir / MANIFEST_NAME
    if len(line.render()) > LINE_LIMIT:
        raise ConfigurationError(f"{path}: {line.shard} has too many row groups for a line; lower --shard_size_mb")
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(line.render())
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(run_dir)


def read_manifest(run_dir: Path) -> list[ManifestLine]:
    """Return the finished shards in the order they were finished; no manifest means none.

    A torn last line is ignored with a log line; any other damage raises FaultError with the line's number.
    """
    lines, torn = parse_manifest(run_dir)
    path = run_dir / MANIFEST_NAME
    if torn:
        log(f"{path}: line {len(lines) + 1} is torn and ignored; its shard will be made again on resume")
    for number, line in enumerate(lines, start=1):
        if line is None:
            raise FaultError(line_fault(run_dir, number))
    return [line for line in lines if line is not None]


def parse_manifest(run_dir: Path) -> tuple[list[ManifestLine | None], bool]:
    """Return each complete line (None where damaged) and whether a torn one follows them; no manifest means none.

    Raises FaultError where the manifest is no plain file or larger than any of ours.
    """
    path = run_dir / MANIFEST_NAME
    try:
        return parse_lines(read_plain(path, MANIFEST_LIMIT))
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise FaultError(unread(path, error)) from error
    except ValueError as error:
        raise FaultError(Fault(path, str(error), f"move it away and {REPAIR}, which rebuilds it")) from error


def parse_lines(text: bytes) -> tuple[list[ManifestLine | None], bool]:
    """Return what `parse_manifest` does of a manifest's text."""
    *whole, rest = text.split(b"\n")
    return [_parse_line(line) for line in whole], rest != b""


def line_fault(run_dir: Path, number: int) -> Fault:
    """Return what there is to say of a damaged line."""
    return Fault(run_dir / MANIFEST_NAME, f"line {number} is not as it was written, by its own digest", REPAIR)


def canonical_json(values: object) -> bytes:
    """Return `values` as JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _parse_line(text: bytes) -> ManifestLine | None:
    try:
        if len(text) >= LINE_LIMIT:
            return None
        values: dict[str, Any] = json.loads(text)
        del values["digest"]
        crc = tuple(tuple(group) for group in values["chunk_crc32"])
        line = ManifestLine(**values | {"notes": tuple(values["notes"]), "chunk_crc32": crc})
        return line if _is_possible(line) and line.render() == text + b"\n" else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_possible(line: ManifestLine) -> bool:
    """Say whether the fields are of their types and could be true of any shard."""
    counts = (line.index, line.first_sequence, line.stop_sequence, line.sequences, line.tokens, line.bytes)
    return (
        all(type(number) is int and 0 <= number < 2**63 for number in chain(counts, *line.chunk_crc32))
        and all(isinstance(text, str) for text in (line.sha256, line.footer_blake2b, *line.notes))
        and type(line.seconds) in (int, float)
        and line.shard == shard_name(line.index)
        and 0 < line.sequences == line.stop_sequence - line.first_sequence <= line.tokens
    )


def _digest(values: dict[str, Any]) -> str:
    return hashlib.blake2b(canonical_json(values), digest_size=16).hexdigest()
