"""One shard as a file: finding shards, checking their footers, reading row groups, learning where each sequence is.

Everything that comes from a file is doubted here: a footer is compared with its own schema, name and row count before
data is read, pages with their checksums, and the rows with the footer's sequence range.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.plan import PlannedShard
from traces.schema import SHARD_KEY, TraceSpec, arrow_schema, decoded_bytes_per_token
from traces.splits import split_of
from traces.writer import ROW_GROUP_BYTES

_STRINGS = ["dataset", "sequence_key", "token"]


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """Where one sequence is and what it is, without its routing."""

    sequence_id: int
    dataset: str
    sequence_key: str
    num_tokens: int
    split: str
    shard: int  # index into shard_paths
    row_group: int
    row_offset: int  # first row within the row group


@dataclass(frozen=True)
class ShardFooter:
    """What a shard says of itself: its spec and range, and Parquet's own metadata."""

    spec: TraceSpec
    planned: PlannedShard
    metadata: pq.FileMetaData


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


def read_footer(path: Path) -> ShardFooter:
    """Read a shard's footer; raises ConfigurationError unless it is that of a sound shard, before any data is read."""
    try:
        return parse_footer(path)
    except ValueError as error:
        raise ConfigurationError(
            f"{path}: not a routing-trace shard ({error}); move it away or collect this shard again"
        ) from error


def parse_footer(path: Path) -> ShardFooter:
    """Read a shard's footer; raises ValueError with the reason why it is not one."""
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        spec = TraceSpec.from_footer(metadata.metadata)
        planned = PlannedShard(**json.loads(metadata.metadata[SHARD_KEY]))
        largest = max((metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)), default=0)
        if not schema.equals(arrow_schema(spec)):
            raise ValueError(f"columns {schema.names} are not those of its metadata, {arrow_schema(spec).names}")
        if planned.name != path.name:
            raise ValueError(f"its footer is that of {planned.name}")
        if metadata.num_rows != planned.num_tokens:
            raise ValueError(f"{metadata.num_rows} rows where its footer plans {planned.num_tokens}")
        if largest * decoded_bytes_per_token(spec) > ROW_GROUP_BYTES:
            raise ValueError(f"a row group of {largest} rows would take more than {ROW_GROUP_BYTES >> 20} MiB")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(first_line(error)) from error
    return ShardFooter(spec, planned, metadata)


def read_row_group(path: Path, row_group: int, columns: Sequence[str], metadata: pq.FileMetaData) -> pa.Table:
    """Read some columns of a row group with page checksums verified, strings as dictionaries.

    Checksums do not cover page headers, so rows are counted and strings validated (UTF-8, dictionary indices) as well.
    Raises ExpertSpeculationError naming the file where the data does not read.
    """
    try:
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=_STRINGS, page_checksum_verification=True) as file:
            table = file.read_row_group(row_group, columns=list(columns)).unify_dictionaries()
        for name in set(_STRINGS).intersection(columns):
            table[name].validate(full=True)
            for chunk in table[name].chunks:
                chunk.dictionary.validate(full=True)
        rows = metadata.row_group(row_group).num_rows
        if table.num_rows != rows or any(column.null_count for column in table.columns):
            raise pa.ArrowInvalid(f"{table.num_rows} rows, some of them null, where the footer says {rows} without")
        return table
    except (pa.ArrowException, OSError) as error:
        raise ExpertSpeculationError(
            f"{path}: row group {row_group} can not be read ({first_line(error)}); "
            "run 'expert-speculation verify' and collect the shard again"
        ) from error


def index_shard(path: Path, footer: ShardFooter, shard: int) -> Iterator[SequenceInfo]:
    """Yield a shard's sequences; raises ConfigurationError unless they are whole, in order and the footer's range."""
    expected = footer.planned.first_sequence
    for group in range(footer.metadata.num_row_groups):
        names = ["sequence_id", "position", "token_id", "dataset", "sequence_key"]
        table = read_row_group(path, group, names, footer.metadata)
        ids, token_ids = table["sequence_id"].to_numpy(), table["token_id"].to_numpy()
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        lengths = np.diff(starts, append=len(ids))
        in_place = np.arange(len(ids)) - np.repeat(starts, lengths)
        whole = np.array_equal(table["position"].to_numpy(), in_place)
        if not whole or not np.array_equal(ids[starts], expected + np.arange(len(starts))):
            raise ConfigurationError(
                f"{path}: row group {group} does not hold whole sequences from {expected} on; "
                "run 'expert-speculation verify' and collect the shard again"
            )
        expected += len(starts)
        datasets, keys = (table[name].take(pa.array(starts)).to_pylist() for name in ("dataset", "sequence_key"))
        tokens: list[str] | None = None
        for i, (offset, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            own_ids, own_tokens = token_ids[offset : offset + length], [""]
            if (own_ids == -1).all():
                tokens = tokens or strings(read_row_group(path, group, ["token"], footer.metadata)["token"])
                own_tokens = tokens[offset : offset + length]
                if not any(own_tokens):  # nothing known of the text: its name in the source has to do
                    own_tokens = [datasets[i], keys[i]]
            yield SequenceInfo(
                sequence_id=int(ids[offset]),
                dataset=sys.intern(datasets[i]),
                sequence_key=keys[i],
                num_tokens=length,
                split=split_of(own_ids, own_tokens),
                shard=shard,
                row_group=group,
                row_offset=offset,
            )
    if expected != footer.planned.stop_sequence:
        raise ConfigurationError(
            f"{path}: holds sequences up to {expected}, its footer says {footer.planned.stop_sequence}; "
            "run 'expert-speculation verify' and collect the shard again"
        )


def list_values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return the values of a fixed-size list column, flat, as a view of Arrow's buffer where it is one chunk."""
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    values: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=True)
    return values


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
