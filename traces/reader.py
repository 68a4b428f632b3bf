"""Reads trace folders: whole sequences, chosen columns, any split, any order, within the memory of a few row groups.

Opening reads the footers only and refuses what is no trace. The first use of `index` passes once over the narrow
columns (ids, positions, names) to learn each sequence's place and split. A shuffled order is drawn from the seed
alone: row groups are shuffled, then the sequences within each window of WINDOW_ROW_GROUPS; so any position can be
resumed without reading what comes before it.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.plan import PlannedShard
from traces.schema import SHARD_KEY, SequenceTrace, TraceSpec, arrow_schema, decoded_bytes_per_token
from traces.splits import split_of, splits_named
from traces.writer import ROW_GROUP_BYTES

WINDOW_ROW_GROUPS = 4  # decoded at once while shuffling: at most 256 MiB
COLUMNS = {"weights": "routing_weights", "logits": "router_logits", "lookahead": "lookahead_logits", "tokens": "token"}
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


class TraceDataset:
    """The sequences of a run folder or its `data/`.

    Raises ConfigurationError when the folder holds no shards, a file is not a shard, or footers disagree.
    """

    def __init__(self, shard_dir: Path) -> None:
        self.shard_paths = find_shards(Path(shard_dir))
        self._footers = [read_footer(path) for path in self.shard_paths]
        first = self._footers[0].spec
        for path, footer in zip(self.shard_paths, self._footers, strict=True):
            for name, value in first.to_json().items():
                found = footer.spec.to_json()[name]
                if found != value:
                    raise ConfigurationError(
                        f"{path}: {name} is {found!r}, but {value!r} in {self.shard_paths[0].name}; "
                        "a folder holds one run, move the other run's shards to a folder of their own"
                    )
        self.spec = first
        self.num_tokens = sum(footer.metadata.num_rows for footer in self._footers)
        self.num_sequences = sum(f.planned.stop_sequence - f.planned.first_sequence for f in self._footers)

    @cached_property
    def available(self) -> frozenset[str]:
        """Return what the traces hold, of `ids`, `weights`, `logits`, `lookahead`, `tokens` (ids or strings known)."""
        known = {"tokens"} if self._any_above("token_id", -1) or self._any_above("token", "") else set()
        return frozenset({"ids", *self.spec.store, *known})

    @cached_property
    def index(self) -> list[SequenceInfo]:
        """Return every sequence in stored order; the first use reads the narrow columns once."""
        shards = enumerate(zip(self.shard_paths, self._footers, strict=True))
        return [info for shard, (path, footer) in shards for info in index_shard(path, footer, shard)]

    @cached_property
    def datasets(self) -> list[str]:
        """Return the names of the data sets, in order of first appearance."""
        return list(dict.fromkeys(info.dataset for info in self.index))

    def sequences(
        self,
        split: str = "all",
        columns: Collection[str] = ("weights",),
        *,
        hold_out: Collection[str] = (),
        only: Collection[str] = (),
        shuffle_seed: int | None = None,
        start: int = 0,
    ) -> Iterator[SequenceTrace]:
        """Stream the sequences of a split, expert ids and token ids always, beside them the `columns` asked for.

        `columns`: any of `weights`, `logits`, `lookahead`, `tokens` (strings); what the run does not have stays None.
        `hold_out` leaves data sets out, `only` keeps just these. With `shuffle_seed` the order is a permutation fixed
        by the seed and the folder; `start` skips that many sequences at no cost, to resume. Raises ConfigurationError
        on unknown split or data set names.
        """
        windows = self.order(split, hold_out=hold_out, only=only, shuffle_seed=shuffle_seed)
        return self._stream(windows, _checked(columns), start)

    def order(
        self,
        split: str = "all",
        *,
        hold_out: Collection[str] = (),
        only: Collection[str] = (),
        shuffle_seed: int | None = None,
    ) -> list[list[int]]:
        """Return the positions in `index` in the order of `sequences`, grouped by what is decoded together."""
        wanted = splits_named(split)
        for name in (*hold_out, *only):
            if name not in self.datasets:
                raise ConfigurationError(
                    f"data set {name!r} is not in these traces; they hold {', '.join(self.datasets)}"
                )
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for position, info in enumerate(self.index):
            if info.split in wanted and info.dataset not in hold_out and (not only or info.dataset in only):
                groups[info.shard, info.row_group].append(position)
        if shuffle_seed is None:
            return list(groups.values())
        generator = np.random.default_rng(shuffle_seed)
        keys = list(groups)
        keys = [keys[i] for i in generator.permutation(len(keys))]
        windows = [keys[i : i + WINDOW_ROW_GROUPS] for i in range(0, len(keys), WINDOW_ROW_GROUPS)]
        flat = [np.array([position for key in window for position in groups[key]]) for window in windows]
        return [generator.permutation(positions).tolist() for positions in flat]

    def read(self, sequence_ids: Iterable[int], columns: Collection[str] | None = None) -> list[SequenceTrace]:
        """Return single sequences in the order asked for, with every column there is unless `columns` names fewer.

        Raises ConfigurationError for an id that is not in the folder.
        """
        position_of = {info.sequence_id: position for position, info in enumerate(self.index)}
        ids = list(sequence_ids)
        for each in ids:
            if each not in position_of:
                raise ConfigurationError(f"sequence {each} is not in {self.shard_paths[0].parent}; ids count from 0")
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for each in dict.fromkeys(ids):
            info = self.index[position_of[each]]
            groups[info.shard, info.row_group].append(position_of[each])
        names = _checked(COLUMNS if columns is None else columns)
        found = {trace.sequence_id: trace for trace in self._stream(list(groups.values()), names, 0)}
        return [found[each] for each in ids]

    def _stream(self, windows: list[list[int]], columns: frozenset[str], start: int) -> Iterator[SequenceTrace]:
        for positions in windows:
            if start >= len(positions):
                start -= len(positions)
                continue
            groups: dict[tuple[int, int], RowGroup] = {}
            for position in positions[start:]:
                info = self.index[position]
                key = (info.shard, info.row_group)
                if key not in groups:
                    groups[key] = self._decode(*key, columns)
                yield groups[key].sequence(info)
            start = 0

    def _decode(self, shard: int, row_group: int, columns: frozenset[str]) -> "RowGroup":
        names = ["phase", "token_id", "expert_ids", *(COLUMNS[name] for name in sorted(columns))]
        existing = [name for name in names if name in arrow_schema(self.spec).names]
        table = read_row_group(self.shard_paths[shard], row_group, existing, self._footers[shard].metadata)
        return RowGroup(table, self.spec)

    def _any_above(self, column: str, value: Any) -> bool:
        """Say from the row groups' statistics whether any value of a column exceeds `value`; True where unknown."""
        position = arrow_schema(self.spec).names.index(column)
        for footer in self._footers:
            for group in range(footer.metadata.num_row_groups):
                statistics = footer.metadata.row_group(group).column(position).statistics
                if statistics is None or not statistics.has_min_max or statistics.max > value:
                    return True
        return False


class RowGroup:
    """A decoded row group: its columns as numpy views of Arrow's buffers, from which sequences are copied out."""

    def __init__(self, table: pa.Table, spec: TraceSpec) -> None:
        layers, experts, top_k = spec.num_layers, spec.num_experts, spec.top_k
        shapes = {
            "expert_ids": (layers, top_k),
            "routing_weights": (layers, top_k),
            "router_logits": (layers, experts),
            "lookahead_logits": (spec.horizons, layers, experts),
        }
        self._lists: Mapping[str, NDArray[Any]] = {
            name: list_values(table[name]).reshape(-1, *shape)
            for name, shape in shapes.items()
            if name in table.column_names
        }
        self._token_ids, self._phase = table["token_id"].to_numpy(), table["phase"].to_numpy()
        self._tokens = _strings(table["token"]) if "token" in table.column_names else []

    def sequence(self, info: SequenceInfo) -> SequenceTrace:
        """Return one sequence; its arrays are copies, so that it does not keep the row group in memory."""
        rows = slice(info.row_offset, info.row_offset + info.num_tokens)
        lists = {name: values[rows].copy() for name, values in self._lists.items()}
        return SequenceTrace(
            dataset=info.dataset,
            sequence_id=info.sequence_id,
            sequence_key=info.sequence_key,
            token_ids_T=self._token_ids[rows].copy(),
            tokens_T=self._tokens[rows],
            phase_T=self._phase[rows].copy(),
            expert_ids_TLK=lists["expert_ids"],
            routing_weights_TLK=lists.get("routing_weights"),
            router_logits_TLE=lists.get("router_logits"),
            lookahead_logits_THLE=lists.get("lookahead_logits"),
        )


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
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(first_line(error)) from error
    return ShardFooter(spec, planned, metadata)


def read_row_group(path: Path, row_group: int, columns: Sequence[str], metadata: pq.FileMetaData) -> pa.Table:
    """Read some columns of a row group with page checksums verified, strings as dictionaries.

    Raises ExpertSpeculationError naming the file where the data does not read.
    """
    try:
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=_STRINGS, page_checksum_verification=True) as file:
            return file.read_row_group(row_group, columns=list(columns)).unify_dictionaries()
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
                tokens = tokens or _strings(read_row_group(path, group, ["token"], footer.metadata)["token"])
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


def _strings(column: pa.ChunkedArray) -> list[str]:
    """Return a dictionary-encoded string column as a list, looking each distinct string up once."""
    result: list[str] = []
    for chunk in column.chunks:
        distinct = chunk.dictionary.to_pylist()
        result.extend(map(distinct.__getitem__, chunk.indices.to_numpy().tolist()))
    return result


def _checked(columns: Collection[str]) -> frozenset[str]:
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; choose of {', '.join(COLUMNS)}")
    return frozenset(columns)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: Arrow appends its own source lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]
