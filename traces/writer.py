"""Writes one shard so that it is either wholly there, and listed in the manifest, or not there at all.

Protocol: temporary file in `.tmp/` (nothing but shards ever stands in `data/`) -> close -> fsync -> reopen and check
schema, rows and range -> sha256 -> `os.replace` into `data/` -> fsync the folder -> append and fsync the manifest
line. Killed anywhere, the shard has no manifest line and is made again; the leftover is overwritten. Not claimed:
safety from power loss on disks that lie about fsync. Memory: one row group, at most 64 MiB decoded.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundwork.atomic import fsync_folder
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.checksums import checksums, file_sha256
from traces.manifest import ManifestLine, append_line
from traces.plan import PlannedShard
from traces.schema import (
    HIDDEN,
    ROUTER_INPUT,
    ROW_GROUP_BYTES,
    SHARD_KEY,
    SequenceTrace,
    TraceSpec,
    arrow_schema,
    decoded_bytes_per_token,
)

__all__ = ["ROW_GROUP_BYTES", "ShardWriter", "file_sha256", "list_shard", "lock_run"]

ROW_GROUP_TOKENS = 65536  # 32-64k tokens read fastest (docs/TRACE_FORMAT.md)


class ShardWriter:
    """Writes the sequences of one planned shard, in order; leaving the `with` block without `commit()` discards them.

    The caller holds `lock_run(run_dir)`, or its writer hands the shard to the process that does (`finish`), and then
    `attempt` makes the temporary file's name one that no other writer of the shard has. Raises ValueError when a
    sequence does not fit the spec or the plan. A row group holds whole sequences, `row_group_tokens` or fewer unless a
    single sequence is longer, and at most ROW_GROUP_BYTES.
    """

    def __init__(
        self,
        run_dir: Path,
        spec: TraceSpec,
        planned: PlannedShard,
        *,
        row_group_tokens: int = ROW_GROUP_TOKENS,
        attempt: str = "",
    ) -> None:
        self.run_dir, self.spec, self.planned = run_dir, spec, planned
        self.temporary = run_dir / ".tmp" / (f"{attempt}.{planned.name}" if attempt else planned.name)
        self.path = run_dir / "data" / planned.name
        self._handed_on = False
        self._schema = arrow_schema(spec).with_metadata(spec.to_footer() | {SHARD_KEY: _shard_footer(planned)})
        self._group_tokens = min(row_group_tokens, ROW_GROUP_BYTES // decoded_bytes_per_token(spec))
        self._pending: list[SequenceTrace] = []
        self._pending_tokens = 0
        self._next, self._tokens = planned.first_sequence, 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        for folder in (self.temporary.parent, self.path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._file = self.temporary.open("wb")
        try:
            self._parquet: pq.ParquetWriter | None = pq.ParquetWriter(self._file, self._schema, **_options(self.spec))
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # on a full disk the footer can not be written either
            self._close()
        with contextlib.suppress(OSError):  # nor what is still buffered; the file is closed all the same
            self._file.close()
        if not self._handed_on:
            self.temporary.unlink(missing_ok=True)

    def write(self, sequence: SequenceTrace) -> None:
        """Add the shard's next sequence."""
        if sequence.sequence_id != self._next or self._next >= self.planned.stop_sequence:
            raise ValueError(f"sequence {sequence.sequence_id} given where {self.planned} expects {self._next}")
        if sequence.num_tokens * decoded_bytes_per_token(self.spec) > ROW_GROUP_BYTES:
            limit = ROW_GROUP_BYTES // decoded_bytes_per_token(self.spec)
            raise ConfigurationError(
                f"sequence {sequence.sequence_key!r} of {sequence.dataset} has {sequence.num_tokens} tokens, a row "
                f"group holds {limit} with these columns; lower --max_length or store fewer columns"
            )
        try:
            sequence.check(self.spec)
        except ValueError as error:
            raise ValueError(f"sequence {sequence.sequence_id} of {sequence.dataset}: {error}") from error
        if self._pending_tokens + sequence.num_tokens > self._group_tokens:
            self._flush()
        self._pending.append(sequence)
        self._pending_tokens += sequence.num_tokens
        self._tokens += sequence.num_tokens
        self._next += 1

    def commit(self, notes: Sequence[str] = ()) -> ManifestLine:
        """Check the finished file, move it into `data/` and list it; returns its manifest line; raises as `finish`."""
        line = self.finish(notes)
        self._handed_on = False
        list_shard(self.run_dir, self.temporary, line)
        return line

    def finish(self, notes: Sequence[str] = ()) -> ManifestLine:
        """Check the finished file and leave it at `temporary`; returns the line that `list_shard` is to list it with.

        Raises ValueError when sequences are missing, ExpertSpeculationError when the file does not read back as
        written.
        """
        if (self._next, self._tokens) != (self.planned.stop_sequence, self.planned.num_tokens):
            raise ValueError(f"{self.planned} holds sequences up to {self._next} with {self._tokens} tokens only")
        self._flush()
        with _naming(self.run_dir):
            self._close()
            with self.temporary.open("rb+") as file:
                os.fsync(file.fileno())
        self._check_file()
        line = ManifestLine(
            shard=self.planned.name,
            index=self.planned.index,
            first_sequence=self.planned.first_sequence,
            stop_sequence=self.planned.stop_sequence,
            sequences=self.planned.stop_sequence - self.planned.first_sequence,
            tokens=self._tokens,
            **checksums(self.temporary)._asdict(),
            seconds=round(time.monotonic() - self._started, 3),
            notes=tuple(notes),
        )
        self._handed_on = True
        return line

    def _flush(self) -> None:
        """Write the pending sequences as one row group."""
        if not self._pending:
            return
        group, self._pending, self._pending_tokens = self._pending, [], 0
        assert self._parquet is not None
        rows = to_table(group, self.spec, self._schema)
        with _naming(self.run_dir):
            self._parquet.write_table(rows, row_group_size=rows.num_rows)

    def _close(self) -> None:
        if self._parquet is not None:
            parquet, self._parquet = self._parquet, None
            parquet.close()
            self._file.close()

    def _check_file(self) -> None:
        """Reopen the closed file and compare schema, footer, rows and sequence range with the plan."""
        with pq.ParquetFile(self.temporary, page_checksum_verification=True) as file:
            ids = file.read(columns=["sequence_id"])["sequence_id"].to_numpy()
            sound = (
                file.schema_arrow.equals(self._schema, check_metadata=True)
                and file.metadata.num_rows == len(ids) == self.planned.num_tokens
                and np.array_equal(np.unique(ids), np.arange(self.planned.first_sequence, self.planned.stop_sequence))
            )
        if not sound:
            raise ExpertSpeculationError(
                f"{self.temporary}: does not read back as it was written; check the disk and run again with --resume"
            )


def list_shard(run_dir: Path, temporary: Path, line: ManifestLine) -> None:
    """Move a shard that a writer has finished into `data/` and list it; the caller holds the run's lock."""
    path = run_dir / "data" / line.shard
    os.replace(temporary, path)  # noqa: PTH105 - named as in the protocol
    fsync_folder(path.parent)
    append_line(run_dir, line)


def to_table(sequences: Sequence[SequenceTrace], spec: TraceSpec, schema: pa.Schema) -> pa.Table:
    """Return whole sequences as the rows of a shard, one row per token."""
    lengths = np.array([sequence.num_tokens for sequence in sequences])
    columns: dict[str, pa.Array] = {
        "dataset": _repeat([sequence.dataset for sequence in sequences], lengths),
        "sequence_id": pa.array(np.repeat([s.sequence_id for s in sequences], lengths).astype(np.uint32)),
        "sequence_key": _repeat([sequence.sequence_key for sequence in sequences], lengths),
        "position": pa.array(np.concatenate([np.arange(length, dtype=np.uint32) for length in lengths])),
        "phase": pa.array(np.concatenate([sequence.phase_T for sequence in sequences])),
        "token_id": pa.array(np.concatenate([sequence.token_ids_T for sequence in sequences])),
        "token": pa.array([token for sequence in sequences for token in sequence.tokens_T], pa.string()),
    }
    arrays: dict[str, list[NDArray[Any] | None]] = {
        "expert_ids": [sequence.expert_ids_TLK for sequence in sequences],
        "routing_weights": [sequence.routing_weights_TLK for sequence in sequences],
        "router_logits": [sequence.router_logits_TLE for sequence in sequences],
        "lookahead_logits": [sequence.lookahead_logits_THLE for sequence in sequences],
    }
    if HIDDEN in spec.store:
        columns[ROUTER_INPUT] = _sparse(sequences)
    for name in spec.widths:
        values: NDArray[Any] = np.concatenate([each.reshape(-1) for each in arrays[name] if each is not None])
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), type=schema.field(name).type)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _sparse(sequences: Sequence[SequenceTrace]) -> pa.Array:
    """Return the router inputs of all tokens as bytes, null where there is none."""
    values: list[bytes | None] = []
    for sequence in sequences:
        own: list[bytes | None] = [None] * sequence.num_tokens
        assert sequence.hidden_positions_N is not None
        assert sequence.router_input_NLD is not None
        for place, value in zip(sequence.hidden_positions_N.tolist(), sequence.router_input_NLD, strict=True):
            own[place] = value.astype("<f2").tobytes()
        values += own
    return pa.array(values, pa.binary())


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the run folder as its only writer; an `flock`, so the death of the process releases it.

    Raises ConfigurationError when another process holds it, and where something in it leads out of it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(run_dir / ".lock", flags, 0o666), "rb")
    except OSError as error:
        raise ConfigurationError(
            f"{run_dir}: can not be written ({error.strerror}); give another --output_dir or its permissions"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"{run_dir}: another process is writing this run; wait for it or choose another --output_dir"
            ) from error
        for folder in (run_dir / ".tmp", run_dir / "data"):
            if folder.is_symlink():
                raise ConfigurationError(f"{folder}: a link, wanted a folder; move it away, or move its target here")
        yield


@contextlib.contextmanager
def _naming(run_dir: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error that names the folder and says how to go on."""
    try:
        yield
    except OSError as error:
        raise ExpertSpeculationError(
            f"{run_dir}: can not be written ({error.strerror or error}); free disk space and run again with --resume"
        ) from error


def _shard_footer(planned: PlannedShard) -> bytes:
    return json.dumps(
        {
            "index": planned.index,
            "first_sequence": planned.first_sequence,
            "stop_sequence": planned.stop_sequence,
            "num_tokens": planned.num_tokens,
        }
    ).encode()


def _options(spec: TraceSpec) -> dict[str, Any]:
    """Return the Parquet settings measured best (benchmarks/trace_format.py): lists byte-stream-split, for `pages`."""
    narrow = [name for name in arrow_schema(spec).names if name not in (*spec.widths, ROUTER_INPUT)]
    lists = [f"{name}.list.element" for name in spec.widths]
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [name for name in narrow if name != "position"],
        "column_encoding": {"position": "DELTA_BINARY_PACKED"} | dict.fromkeys(lists, "BYTE_STREAM_SPLIT"),
        "write_statistics": narrow,
        "write_page_checksum": True,
    }


def _repeat(values: list[str], lengths: NDArray[np.int64]) -> pa.Array:
    """Return each string `length` times, without a Python loop over tokens.

    Each distinct string stands in the dictionary once: for a second one Arrow leaves room in the file that it does not
    fill, and whatever was in memory goes there (pyarrow 26).
    """
    distinct = {value: place for place, value in enumerate(dict.fromkeys(values))}
    indices = np.repeat(np.array([distinct[value] for value in values], np.int32), lengths)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(list(distinct), pa.string()))
