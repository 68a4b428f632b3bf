"""One shard as a file: finding shards, checking their footers, reading columns of a row group.

Everything that comes from a file is doubted here. A footer is compared with its manifest line, its own schema, name and
row count, and bounds what may be allocated, before data is read; every column chunk is compared with its manifest line
and its page checksums before it is decoded.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.checksums import chunk_range, footer_digest, parse_metadata, read_chunk, read_footer_bytes
from traces.manifest import ManifestLine
from traces.pages import decode_lists, is_split, walk_pages
from traces.plan import PlannedShard
from traces.schema import ROW_GROUP_BYTES, SHARD_KEY, TraceSpec, arrow_schema, decoded_bytes_per_token

__all__ = ["Shard", "find_shards", "first_line", "open_shard", "parse_shard", "strings"]

_STRINGS = ["dataset", "sequence_key", "token"]
_DOUBTS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError)


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard whose footer is sound; without a manifest line its bytes are vouched for by page checksums only."""

    path: Path
    spec: TraceSpec
    planned: PlannedShard
    metadata: pq.FileMetaData
    line: ManifestLine | None

    @property
    def num_row_groups(self) -> int:
        """Return the number of row groups."""
        return int(self.metadata.num_row_groups)

    def num_rows(self, row_group: int) -> int:
        """Return the tokens of a row group."""
        return int(self.metadata.row_group(row_group).num_rows)

    def lists(self, row_group: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return list columns of a row group as arrays [T, ...] of the spec's shapes.

        Raises ExpertSpeculationError naming the file where the data does not read.
        """
        try:
            with self.path.open("rb") as file:
                arrays = {}
                for name in names:
                    chunk = self._checked_chunk(file, row_group, name)
                    arrays[name] = self._decode(chunk, row_group, name).reshape(-1, *self.spec.shapes[name])
                return arrays
        except _DOUBTS as error:
            self._refuse(row_group, error)

    def table(self, row_group: int, names: Sequence[str]) -> pa.Table:
        """Return columns of a row group as Arrow has them, strings as dictionaries.

        Rows are counted and strings validated (UTF-8, dictionary indices). Raises ExpertSpeculationError naming the
        file where the data does not read.
        """
        try:
            with self.path.open("rb") as file:
                for name in names:
                    self._check_sizes(self._checked_chunk(file, row_group, name), row_group, name)
            return self.arrow_table(row_group, names)
        except _DOUBTS as error:
            self._refuse(row_group, error)

    def arrow_table(self, row_group: int, names: Sequence[str]) -> pa.Table:
        """Return columns through Arrow alone; raises Arrow's errors."""
        with pq.ParquetFile(
            self.path, metadata=self.metadata, read_dictionary=_STRINGS, page_checksum_verification=True
        ) as file:
            table = file.read_row_group(row_group, columns=list(names), use_threads=False).unify_dictionaries()
        for name in set(_STRINGS).intersection(names):
            table[name].validate(full=True)
            for chunk in table[name].chunks:
                chunk.dictionary.validate(full=True)
        rows = self.num_rows(row_group)
        if table.num_rows != rows or any(column.null_count for column in table.columns):
            raise pa.ArrowInvalid(f"{table.num_rows} rows, some of them null, where the footer says {rows} without")
        return table

    def _checked_chunk(self, file: Any, row_group: int, name: str) -> memoryview:
        """Return the bytes of a column chunk; raises ValueError where the manifest line has another checksum."""
        number = arrow_schema(self.spec).names.index(name)
        chunk = read_chunk(file, self.metadata.row_group(row_group).column(number))
        if self.line is not None and zlib.crc32(chunk) != self.line.chunk_crc32[row_group][number]:
            raise ValueError(f"{name} differs from the checksum in the manifest")
        return memoryview(chunk)

    def _decode(self, chunk: memoryview, row_group: int, name: str) -> NDArray[Any]:
        column = self.metadata.row_group(row_group).column(arrow_schema(self.spec).names.index(name))
        dtype = self.spec.dtypes[name]
        if is_split(column):
            size = 4 if name == "expert_ids" else 2  # Parquet has no integers below 32 bits
            return decode_lists(chunk, self.num_rows(row_group) * self.spec.widths[name], dtype, size)
        self._check_sizes(chunk, row_group, name)
        array = self.arrow_table(row_group, [name])[name].combine_chunks()
        values: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=True)
        return values

    def _check_sizes(self, chunk: memoryview, row_group: int, name: str) -> None:
        """Raise ValueError where pages claim to decompress to more than the footer says, or than a row group may."""
        column = self.metadata.row_group(row_group).column(arrow_schema(self.spec).names.index(name))
        claimed = sum(page.uncompressed for page in walk_pages(chunk))
        if claimed > min(column.total_uncompressed_size, 4 * ROW_GROUP_BYTES):
            raise ValueError(f"{name} claims {claimed} bytes, its footer {column.total_uncompressed_size}")

    def _refuse(self, row_group: int, error: BaseException) -> NoReturn:
        raise ExpertSpeculationError(
            f"{self.path}: row group {row_group} can not be read ({first_line(error)}); "
            "run 'expert-speculation verify' and collect the shard again"
        ) from error


def find_shards(shard_dir: Path) -> list[Path]:
    """Return the shards of a run folder or its `data/`, by name; raises ConfigurationError where there are none."""
    if not shard_dir.is_dir():
        found = "a file" if shard_dir.exists() else "missing"
        raise ConfigurationError(
            f"{shard_dir}: {found}, wanted a trace folder; give the folder that 'expert-speculation collect' wrote"
        )
    folder = shard_dir / "data" if (shard_dir / "data").is_dir() else shard_dir
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
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
        if path.is_symlink() or not path.is_file():
            raise ValueError("a link or no plain file: copy the file itself here")
        with path.open("rb") as file:
            footer = read_footer_bytes(file)
        if line is not None and (path.stat().st_size, footer_digest(footer)) != (line.bytes, line.footer_blake2b):
            raise ValueError("its size or footer differs from its manifest line")
        metadata = parse_metadata(footer)
        schema = metadata.schema.to_arrow_schema()
        spec = TraceSpec.from_footer(metadata.metadata)
        planned = PlannedShard(**json.loads(metadata.metadata[SHARD_KEY]))
        if not schema.equals(arrow_schema(spec)):
            raise ValueError(f"columns {schema.names} are not those of its metadata, {arrow_schema(spec).names}")
        if planned.name != path.name:
            raise ValueError(f"its footer is that of {planned.name}")
        if metadata.num_rows != planned.num_tokens:
            raise ValueError(f"{metadata.num_rows} rows where its footer plans {planned.num_tokens}")
        _check_row_groups(metadata, spec, path.stat().st_size - len(footer))
        if line is not None and [len(group) for group in line.chunk_crc32] != (
            [metadata.num_columns] * metadata.num_row_groups
        ):
            raise ValueError("its manifest line has checksums of other row groups")
    except _DOUBTS as error:
        raise ValueError(first_line(error)) from error
    return Shard(path, spec, planned, metadata, line)


def strings(column: pa.ChunkedArray) -> list[str]:
    """Return a dictionary-encoded string column as a list, looking each distinct string up once."""
    result: list[str] = []
    for chunk in column.chunks:
        distinct = chunk.dictionary.to_pylist()
        result.extend(map(distinct.__getitem__, chunk.indices.to_numpy().tolist()))
    return result


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: Arrow appends its own source lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_row_groups(metadata: pq.FileMetaData, spec: TraceSpec, data_bytes: int) -> None:
    """Raise ValueError where row groups would take too much memory, or claim rows or bytes that are not there."""
    rows = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        rows += group.num_rows
        if not 0 < group.num_rows * decoded_bytes_per_token(spec) <= ROW_GROUP_BYTES:
            raise ValueError(f"a row group of {group.num_rows} rows would take more than {ROW_GROUP_BYTES >> 20} MiB")
        for start, length in (chunk_range(group.column(number)) for number in range(metadata.num_columns)):
            if start < 0 or length <= 0 or start + length > data_bytes:
                raise ValueError(f"a column at bytes {start} to {start + length} of {data_bytes}")
    if rows != metadata.num_rows:
        raise ValueError(f"row groups of {rows} rows in all where its footer says {metadata.num_rows}")
