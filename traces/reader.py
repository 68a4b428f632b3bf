"""Reads trace folders: whole sequences, chosen columns, any split, any order, within the memory of a few row groups.

Opening reads the footers only and refuses what is no trace. The first use of `index` passes once over the narrow
columns (ids, positions, names) to learn each sequence's place and split. A shuffled order is drawn from the seed
alone: row groups are shuffled, then the sequences within each window of WINDOW_ROW_GROUPS; so any position can be
resumed without reading what comes before it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from traces.schema import SequenceTrace, TraceSpec, arrow_schema
from traces.shards import SequenceInfo, find_shards, index_shard, list_values, read_footer, read_row_group, strings
from traces.splits import splits_named

__all__ = ["COLUMNS", "SequenceInfo", "TraceDataset"]

WINDOW_ROW_GROUPS = 4  # decoded at once while shuffling: at most 256 MiB
COLUMNS = {"weights": "routing_weights", "logits": "router_logits", "lookahead": "lookahead_logits", "tokens": "token"}


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
        self._lists: Mapping[str, NDArray[Any]] = {
            name: list_values(table[name]).reshape(-1, *shape)
            for name, shape in spec.shapes.items()
            if name in table.column_names
        }
        self._token_ids, self._phase = table["token_id"].to_numpy(), table["phase"].to_numpy()
        self._tokens = strings(table["token"]) if "token" in table.column_names else []

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


def _checked(columns: Collection[str]) -> frozenset[str]:
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; choose of {', '.join(COLUMNS)}")
    return frozenset(columns)
