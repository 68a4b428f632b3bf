"""One shard as a file: finding shards, checking their footers, reading columns of a row group.

Everything that comes from a file is doubted here. A footer is compared with its manifest line, its own schema, name and
row count, and bounds what may be allocated, before data is read; every column chunk is compared with its manifest line
and its page checksums before it is decoded.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.checksums import footer_digest, parse_metadata, read_chunk, read_footer_bytes
from traces.chunk_file import ChunkFile
from traces.claims import check_chunks, check_pages, check_plain, check_strings, chunk_range
from traces.faults import RESUME, Fault, FaultError, first_line
from traces.manifest import MANIFEST_NAME, ManifestLine, range_of
from traces.pages import decode_lists, is_split
from traces.plain_files import open_plain
from traces.plan import PLAN_NAME, SEQUENCES_NAME, PlannedShard, planned_shards
from traces.schema import (
    ROUTER_INPUT,
    ROW_GROUP_BYTES,
    SHARD_KEY,
    TraceSpec,
    arrow_schema,
    decoded_bytes_per_token,
)

_STRINGS = ["dataset", "sequence_key", "token"]
_COLUMN_LIMIT = 4 * ROW_GROUP_BYTES  # of pages, and of strings written out: 4 kB a token and more
DOUBTS = (  # what a file's content can raise
    *(pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, RuntimeError, MemoryError),
)


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard whose footer is sound; without a manifest line its bytes are vouched for by page checksums only."""

    path: Path
    spec: TraceSpec
    planned: PlannedShard
    metadata: pq.FileMetaData
    line: ManifestLine | None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Parquet's number of each column; every one of ours has a single leaf."""
        return {name: number for number, name in enumerate(arrow_schema(self.spec).names)}

    @property
    def num_row_groups(self) -> int:
        """Return the number of row groups."""
        return int(self.metadata.num_row_groups)

    def num_rows(self, row_group: int) -> int:
        """Return the tokens of a row group."""
        return int(self.metadata.row_group(row_group).num_rows)

    def lists(self, row_group: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return list columns of a row group as arrays [T, ...] of the spec's shapes; expert ids are below E.

        Raises ExpertSpeculationError naming the file where the data does not read.
        """
        try:
            with open_plain(self.path) as file:
                read = {
                    name: self._decode(self._checked_chunk(file, row_group, name), row_group, name) for name in names
                }
            if "expert_ids" in read:
                self._check_ids(read["expert_ids"])
            return read
        except DOUBTS as error:
            self._refuse(row_group, error)

    def agreed_list(self, row_group: int, name: str) -> NDArray[Any]:
        """Return a list column as `lists` does, having compared every bit of it with what Arrow decodes."""
        try:
            with open_plain(self.path) as file:
                chunk = self._checked_chunk(file, row_group, name)
            values, arrow = self._decode(chunk, row_group, name), self._through_arrow(chunk, row_group, name)
            bits = np.dtype(f"u{values.itemsize}")  # NaN is equal to itself only as bits
            if not np.array_equal(values.view(bits), arrow.view(bits)):
                raise ValueError(f"{name} reads differently through Arrow")
            return values
        except DOUBTS as error:
            self._refuse(row_group, error)

    def table(self, row_group: int, names: Sequence[str]) -> pa.Table:
        """Return columns of a row group as Arrow has them, strings as dictionaries.

        Rows are counted and strings validated (UTF-8, dictionary indices). Raises ExpertSpeculationError naming the
        file where the data does not read.
        """
        try:
            with open_plain(self.path) as file:
                return self._arrow_table(
                    {name: self._checked_chunk(file, row_group, name) for name in names}, row_group
                )
        except DOUBTS as error:
            self._refuse(row_group, error)

    def _arrow_table(self, chunks: dict[str, memoryview], row_group: int) -> pa.Table:
        """Return the columns of these chunks as Arrow decodes them; page sizes are checked first."""
        columns = {name: self.metadata.row_group(row_group).column(self._numbers[name]) for name in chunks}
        for name, chunk in chunks.items():
            check_pages(chunk, columns[name], _COLUMN_LIMIT)
            if name == ROUTER_INPUT:
                check_plain(chunk)
        source = ChunkFile([(chunk_range(columns[name])[0], chunk) for name, chunk in chunks.items()])
        file = pq.ParquetFile(
            source, metadata=self.metadata, read_dictionary=_STRINGS, page_checksum_verification=True, pre_buffer=False
        )
        table = file.read_row_group(row_group, columns=list(chunks), use_threads=False).unify_dictionaries()
        for name in set(_STRINGS).intersection(chunks):
            check_strings(table[name], _COLUMN_LIMIT)
        rows = self.num_rows(row_group)
        if table.num_rows != rows or any(table[name].null_count for name in chunks if name != ROUTER_INPUT):
            raise pa.ArrowInvalid(f"{table.num_rows} rows, some of them null, where the footer says {rows} without")
        return table

    def _check_ids(self, ids_TLK: NDArray[Any]) -> None:
        """Raise ValueError for an id that compiled loops, which take ids for places in memory, must not see."""
        highest = int(ids_TLK.max(initial=0))  # ids are unsigned
        if highest >= self.spec.num_experts:
            raise ValueError(f"expert_ids holds {highest}, and the model has {self.spec.num_experts} experts")

    def _checked_chunk(self, file: Any, row_group: int, name: str) -> memoryview:
        """Return the bytes of a column chunk; raises ValueError where the manifest line has another checksum."""
        number = self._numbers[name]
        chunk = read_chunk(file, self.metadata.row_group(row_group).column(number))
        if self.line is not None and zlib.crc32(chunk) != self.line.chunk_crc32[row_group][number]:
            raise ValueError(f"{name} differs from the checksum in the manifest")
        return chunk

    def _decode(self, chunk: memoryview, row_group: int, name: str) -> NDArray[Any]:
        """Return a list column as an array [T, ...] of the spec's shape."""
        if not is_split(chunk):
            return self._through_arrow(chunk, row_group, name)
        count, dtype = self.num_rows(row_group) * self.spec.widths[name], self.spec.dtypes[name]
        size = 4 if name == "expert_ids" else 2  # Parquet has no integers below 32 bits
        values = decode_lists(chunk, count, dtype, size, trusted=self.line is not None)
        return values.reshape(-1, *self.spec.shapes[name])

    def _through_arrow(self, chunk: memoryview, row_group: int, name: str) -> NDArray[Any]:
        array = self._arrow_table({name: chunk}, row_group)[name].combine_chunks()
        values: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=True)
        return values.reshape(-1, *self.spec.shapes[name])

    def _refuse(self, row_group: int, error: BaseException) -> NoReturn:
        raise ExpertSpeculationError(
            f"{self.path}: row group {row_group} can not be read ({first_line(error)}); "
            "run 'expert-speculation verify' and collect the shard again"
        ) from error


class NothingFinishedError(ConfigurationError):
    """The run in `run_dir` has a plan and no finished shard yet."""

    def __init__(self, run_dir: Path, planned: int) -> None:
        super().__init__(
            f"{run_dir}: none of its {planned} planned shards is finished yet; wait for the run, or, where it was "
            f"interrupted, {RESUME}"
        )
        self.run_dir = run_dir


def find_shards(shard_dir: Path) -> list[Path]:
    """Return the shards of a run folder or its `data/`, by name; raises ConfigurationError where there are none.

    That is NothingFinishedError for a run that has only been planned.
    """
    if not shard_dir.is_dir():
        found = "a file" if shard_dir.exists() else "missing"
        raise ConfigurationError(
            f"{shard_dir}: {found}, wanted a trace folder; give the folder that 'expert-speculation collect' wrote"
        )
    data = shard_dir / "data"
    if data.is_symlink():
        raise FaultError(Fault(data, "a link, wanted the folder itself", "move the folder here, or name it instead"))
    folder = data if data.is_dir() else shard_dir
    if folder.name in ("", ".."):  # by its own name a run's `data/` is told from bare shards
        folder = folder.resolve()
    run_dir = folder.parent if folder.name == "data" else folder
    paths = [path for path in sorted(folder.glob("*.parquet")) if path != run_dir / SEQUENCES_NAME]
    if not paths:
        if (run_dir / MANIFEST_NAME).exists() and (run_dir / MANIFEST_NAME).stat().st_size:
            raise ConfigurationError(
                f"{folder}: holds none of the shards that the manifest lists; restore them from a copy, or {RESUME}"
            )
        if (run_dir / PLAN_NAME).exists():
            raise NothingFinishedError(run_dir, len(planned_shards(run_dir)))
        if (run_dir / ".lock").exists():
            raise ConfigurationError(f"{run_dir}: a run that has no plan yet; wait for it, or {RESUME}")
        raise ConfigurationError(
            f"{folder}: holds no .parquet shards; give a folder that 'expert-speculation collect' wrote"
        )
    return paths


def open_shard(path: Path, line: ManifestLine | None = None) -> Shard:
    """Read a shard's footer; raises ConfigurationError unless it is that of a sound shard, before any data is read."""
    try:
        return parse_shard(path, line)
    except ValueError as error:
        raise ConfigurationError(
            f"{path}: not a sound routing-trace shard ({error}); run 'expert-speculation verify' on its run folder, "
            "then restore the file or collect it again"
        ) from error


def parse_shard(path: Path, line: ManifestLine | None = None) -> Shard:
    """Read a shard's footer; raises ValueError with the reason why it is not a sound one."""
    try:
        with open_plain(path) as file:
            footer = read_footer_bytes(file)
            size = file.seek(0, 2)
        if line is not None and (size, footer_digest(footer)) != (line.bytes, line.footer_blake2b):
            raise ValueError("its size or footer differs from its manifest line")
        metadata = parse_metadata(footer)
        schema = metadata.schema.to_arrow_schema()
        spec = TraceSpec.from_footer(metadata.metadata)
        planned = PlannedShard(**json.loads(metadata.metadata[SHARD_KEY]))
        if not schema.equals(arrow_schema(spec)):
            pairs = zip_longest(schema, arrow_schema(spec))
            found, wanted = next((pair for pair in pairs if pair[0] != pair[1]), (schema, arrow_schema(spec)))
            raise ValueError(f"it has column {found} where its metadata wants {wanted}")
        if planned.name != path.name:
            raise ValueError(f"its footer is that of {planned.name}")
        if line is not None and range_of(line) != astuple(planned):
            raise ValueError("its footer's range differs from its manifest line")
        if metadata.num_rows != planned.num_tokens:
            raise ValueError(f"{metadata.num_rows} rows where its footer plans {planned.num_tokens}")
        _check_row_groups(metadata, spec, size - len(footer))
        if line is not None and [len(group) for group in line.chunk_crc32] != (
            [metadata.num_columns] * metadata.num_row_groups
        ):
            raise ValueError("its manifest line has checksums of other row groups")
    except DOUBTS as error:
        raise ValueError(first_line(error)) from error
    return Shard(path, spec, planned, metadata, line)


def strings(column: pa.ChunkedArray) -> list[str]:
    """Return a dictionary-encoded string column as a list, looking each distinct string up once."""
    result: list[str] = []
    for chunk in column.chunks:
        distinct = chunk.dictionary.to_pylist()
        result.extend(map(distinct.__getitem__, chunk.indices.to_numpy().tolist()))
    return result


def _check_row_groups(metadata: pq.FileMetaData, spec: TraceSpec, data_bytes: int) -> None:
    """Raise ValueError where row groups would take too much memory, or claim rows or bytes that are not there."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if not 0 < group.num_rows * decoded_bytes_per_token(spec) <= ROW_GROUP_BYTES:
            raise ValueError(f"a row group of {group.num_rows} rows would take more than {ROW_GROUP_BYTES >> 20} MiB")
    check_chunks(metadata, data_bytes)
