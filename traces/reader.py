"""Reads trace folders: whole sequences, chosen columns and layers, any split, any order, within the memory of a few row
groups.

Opening reads the manifest and the footers only, and refuses what is no trace. The first use of `index` passes once over
the narrow columns (ids, positions, names) to learn each sequence's place and split. A shuffled order is drawn from the
seed alone: row groups are shuffled, then the sequences within each window of WINDOW_ROW_GROUPS; so any position can be
resumed without reading what comes before it, and windows can be dealt out to worker processes.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from groundwork.progress import log
from traces.index import SequenceIndex, SequenceInfo
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.plan import PLAN_NAME, planned_shards
from traces.schema import HIDDEN, ROUTER_INPUT, SequenceTrace, arrow_schema
from traces.shards import Shard, find_shards, open_shard, strings
from traces.splits import ELEMENTARY_SPLITS, splits_named

__all__ = ["COLUMNS", "SequenceInfo", "SequenceStream", "TraceDataset"]

WINDOW_ROW_GROUPS = 4  # decoded at once while shuffling: at most 256 MiB
COLUMNS = {
    "weights": "routing_weights",
    "logits": "router_logits",
    "lookahead": "lookahead_logits",
    "tokens": "token",
    HIDDEN: ROUTER_INPUT,
}


class TraceDataset:
    """The sequences of a run folder or its `data/`; where the run has a manifest, of the shards that it lists.

    Raises ConfigurationError when the folder holds no shards, a file is not a sound one, a listed one is missing, or
    footers disagree.
    """

    def __init__(self, shard_dir: Path) -> None:
        self.shards = _open_all(find_shards(Path(shard_dir)))
        first = self.shards[0].spec
        for shard in self.shards:
            if shard.spec == first:
                continue
            mine, found = first.to_json(), shard.spec.to_json()
            name = next(name for name in mine if mine[name] != found[name])
            raise ConfigurationError(
                f"{shard.path}: {name} is {found[name]!r}, but {mine[name]!r} in {self.shards[0].path.name}; "
                "a folder holds one run, move the other run's shards to a folder of their own"
            )
        self.spec = first
        self.num_tokens = sum(shard.planned.num_tokens for shard in self.shards)
        self.num_sequences = sum(s.planned.stop_sequence - s.planned.first_sequence for s in self.shards)

    @property
    def shard_paths(self) -> list[Path]:
        """Return the shards' files, in order."""
        return [shard.path for shard in self.shards]

    @cached_property
    def available(self) -> frozenset[str]:
        """Return what the traces hold, of `ids`, `weights`, `logits`, `lookahead`, `tokens` (ids or strings known)."""
        known = {"tokens"} if self._any_above("token_id", -1) or self._any_above("token", "") else set()
        return frozenset({"ids", *self.spec.store, *known})

    @cached_property
    def index(self) -> SequenceIndex:
        """Return every sequence in stored order; the first use reads the narrow columns once."""
        return SequenceIndex(self.shards)

    @property
    def datasets(self) -> list[str]:
        """Return the names of the data sets, in order of first appearance."""
        return self.index.datasets

    def sequences(
        self,
        split: str = "all",
        columns: Collection[str] = ("weights",),
        *,
        layers: Sequence[int] | None = None,
        hold_out: Collection[str] = (),
        only: Collection[str] = (),
        shuffle_seed: int | None = None,
        start: int = 0,
        worker: tuple[int, int] = (0, 1),
    ) -> "SequenceStream":
        """Stream the sequences of a split, expert ids and token ids always, beside them the `columns` asked for.

        `columns`: any of `weights`, `logits`, `lookahead`, `tokens` (strings), `hidden` (router inputs); what the run
        does not have stays None. `layers` chooses MoE layers by index, in that order. `hold_out` leaves data sets out,
        `only` keeps just these. With `shuffle_seed` the order is a permutation fixed by the seed and the folder;
        `start` skips that many sequences at no cost; `worker` (i, n) is the i-th of n disjoint parts that together are
        everything.
        Raises ConfigurationError on unknown split or data set names, ValueError on unknown columns or layers.
        """
        if layers is not None and not all(0 <= layer < self.spec.num_layers for layer in layers):
            raise ValueError(f"layers {list(layers)} are not all in 0..{self.spec.num_layers - 1}")
        number, workers = worker
        if not 0 <= number < workers:
            raise ValueError(f"worker {number} of {workers}")
        windows = self.order(split, hold_out=hold_out, only=only, shuffle_seed=shuffle_seed)[number::workers]
        return SequenceStream(self, windows, _checked(columns), layers, start)

    def order(
        self,
        split: str = "all",
        *,
        hold_out: Collection[str] = (),
        only: Collection[str] = (),
        shuffle_seed: int | None = None,
    ) -> list[NDArray[np.int64]]:
        """Return the positions in `index` in the order of `sequences`, grouped by what is decoded together."""
        for name in (*hold_out, *only):
            if name not in self.datasets:
                raise ConfigurationError(
                    f"data set {name!r} is not in these traces; they hold {', '.join(self.datasets)}"
                )
        wanted = [ELEMENTARY_SPLITS.index(each) for each in splits_named(split)]
        kept = [code for code, name in enumerate(self.datasets) if name not in hold_out and (not only or name in only)]
        chosen = np.flatnonzero(np.isin(self.index.split_S, wanted) & np.isin(self.index.dataset_S, kept))
        groups = self._by_row_group(chosen)
        if shuffle_seed is None:
            return groups
        generator = np.random.default_rng(shuffle_seed)
        groups = [groups[i] for i in generator.permutation(len(groups))]
        windows = [groups[i : i + WINDOW_ROW_GROUPS] for i in range(0, len(groups), WINDOW_ROW_GROUPS)]
        return [generator.permutation(np.concatenate(window)) for window in windows]

    def read(self, sequence_ids: Iterable[int], columns: Collection[str] | None = None) -> list[SequenceTrace]:
        """Return single sequences in the order asked for, with every column there is unless `columns` names fewer.

        Raises ConfigurationError for an id that is not in the folder.
        """
        ids = list(sequence_ids)
        stored_S = self.index.sequence_id_S  # rises: shards are in order and sequences count up within them
        places = np.searchsorted(stored_S, ids)
        for each, place in zip(ids, places, strict=True):
            if place == len(stored_S) or stored_S[place] != each:
                raise ConfigurationError(f"sequence {each} is not in {self.shards[0].path.parent}; ids count from 0")
        windows = self._by_row_group(np.unique(places))
        names = _checked(COLUMNS if columns is None else columns)
        found = {trace.sequence_id: trace for trace in SequenceStream(self, windows, names, None, 0)}
        return [found[each] for each in ids]

    def _by_row_group(self, positions_S: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut rising positions where the row group changes."""
        if len(positions_S) == 0:
            return []
        shard_S, group_S = self.index.shard_S[positions_S], self.index.row_group_S[positions_S]
        changes = np.flatnonzero((np.diff(shard_S) != 0) | (np.diff(group_S) != 0)) + 1
        return np.split(positions_S, changes)

    def _any_above(self, column: str, value: Any) -> bool:
        """Say from the row groups' statistics whether any value of a column exceeds `value`; True where unknown."""
        position = arrow_schema(self.spec).names.index(column)
        for shard in self.shards:
            for group in range(shard.num_row_groups):
                statistics = shard.metadata.row_group(group).column(position).statistics
                if statistics is None or not statistics.has_min_max or statistics.max > value:
                    return True
        return False


class SequenceStream(Iterator[SequenceTrace]):
    """An iterator over sequences that can say where it stands, and go on from there in another process."""

    def __init__(
        self,
        dataset: TraceDataset,
        windows: list[NDArray[np.int64]],
        columns: frozenset[str],
        layers: Sequence[int] | None,
        start: int,
    ) -> None:
        self._dataset, self._windows, self._columns = dataset, windows, columns
        self._layers = None if layers is None else list(layers)
        self.position = start
        self._traces = self._read(start)

    def __len__(self) -> int:
        """Return the number of sequences from the beginning to the end."""
        return sum(map(len, self._windows))

    def __next__(self) -> SequenceTrace:
        trace = next(self._traces)
        self.position += 1
        return trace

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: sequences given so far, and the next one with its shard (None at the end).

        `order` is a digest of the whole order, by which another process knows that it has the same before it.
        """
        index = self._dataset.index
        flat = self._flat()
        place = int(flat[self.position]) if self.position < len(flat) else None
        return {
            "position": self.position,
            "sequence_id": None if place is None else int(index.sequence_id_S[place]),
            "shard": None if place is None else self._dataset.shards[index.shard_S[place]].path.name,
            "order": hashlib.blake2b(index.sequence_id_S[flat].tobytes(), digest_size=16).hexdigest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stands; raises ConfigurationError where it is of another order, folder or worker."""
        before, self.position = self.position, int(state["position"])
        if state != self.state_dict():
            self.position = before
            raise ConfigurationError(
                f"{self._dataset.shards[0].path.parent}: the reading state stands before sequence "
                f"{state['sequence_id']} in {state['shard']} of another order; resume with the same shards, split, "
                "seed and number of workers, or start anew"
            )
        self._traces = self._read(self.position)

    def _flat(self) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, np.int64), *self._windows])

    def _read(self, start: int) -> Iterator[SequenceTrace]:
        index = self._dataset.index
        for positions in self._windows:
            if start >= len(positions):
                start -= len(positions)
                continue
            groups: dict[tuple[int, int], _RowGroup] = {}
            for position in positions[start:].tolist():
                key = (int(index.shard_S[position]), int(index.row_group_S[position]))
                if key not in groups:
                    groups[key] = _RowGroup(self._dataset.shards[key[0]], key[1], self._columns, self._layers)
                yield groups[key].sequence(index[position])
            start = 0


class _RowGroup:
    """The columns of a decoded row group, from which sequences are copied out."""

    def __init__(self, shard: Shard, row_group: int, columns: frozenset[str], layers: list[int] | None) -> None:
        names = [COLUMNS[name] for name in sorted(columns)]
        self._lists = shard.lists(row_group, ["expert_ids", *(name for name in names if name in shard.spec.shapes)])
        self._layers = slice(None) if layers is None else layers
        narrow = ["token_id", "phase", "sequence_key", *(["token"] if "token" in names else [])]
        sampled = HIDDEN in columns and HIDDEN in shard.spec.store
        narrow += [ROUTER_INPUT] if sampled else []
        table = shard.table(row_group, narrow)
        self._token_ids, self._phase = table["token_id"].to_numpy(), table["phase"].to_numpy()
        self._keys = table["sequence_key"]
        self._hidden = table[ROUTER_INPUT].combine_chunks() if sampled else None
        self._hidden_shape = (-1, shard.spec.num_layers, shard.spec.hidden_size)
        self._tokens = strings(table["token"]) if "token" in narrow else []

    def sequence(self, info: SequenceInfo) -> SequenceTrace:
        """Return one sequence; its arrays are copies, so that it does not keep the row group in memory."""
        rows = slice(info.row_offset, info.row_offset + info.num_tokens)
        lists = {name: self._chosen(name, values[rows]) for name, values in self._lists.items()}
        return SequenceTrace(
            dataset=info.dataset,
            sequence_id=info.sequence_id,
            sequence_key=self._keys[info.row_offset].as_py(),
            token_ids_T=self._token_ids[rows].copy(),
            tokens_T=self._tokens[rows],
            phase_T=self._phase[rows].copy(),
            expert_ids_TLK=lists["expert_ids"],
            routing_weights_TLK=lists.get("routing_weights"),
            router_logits_TLE=lists.get("router_logits"),
            lookahead_logits_THLE=lists.get("lookahead_logits"),
            **self._sampled(info),
        )

    def _sampled(self, info: SequenceInfo) -> dict[str, Any]:
        """Return a sequence's router inputs and the positions of their tokens; nothing where they were not read."""
        if self._hidden is None:
            return {}
        own = self._hidden.slice(info.row_offset, info.num_tokens)
        values = np.frombuffer(b"".join(own.drop_null().to_pylist()), "<f2").reshape(self._hidden_shape)
        return {
            "hidden_positions_N": np.flatnonzero(own.is_valid().to_numpy(zero_copy_only=False)),
            "router_input_NLD": values[:, self._layers].copy(),
        }

    def _chosen(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        chosen = values[:, :, self._layers] if name == "lookahead_logits" else values[:, self._layers]
        return chosen.copy()


def _open_all(paths: list[Path]) -> list[Shard]:
    """Open the shards that the manifest lists; in a folder that is not part of a run, all there are."""
    folder = paths[0].parent
    run_dir = folder.parent
    if folder.name != "data" or not any((run_dir / name).exists() for name in (PLAN_NAME, MANIFEST_NAME)):
        return [open_shard(path) for path in paths]
    lines = sorted(read_manifest(run_dir), key=lambda line: line.index)
    if not lines or len({line.shard for line in lines}) < len(lines):
        raise ConfigurationError(
            f"{run_dir / MANIFEST_NAME}: lists {'a shard twice' if lines else 'no finished shard'}; go on collecting "
            "with --resume, or, if the file was lost or changed, run 'expert-speculation verify --repair'"
        )
    for line in lines:
        if folder / line.shard not in paths:
            raise ConfigurationError(
                f"{folder / line.shard}: missing, but the manifest lists it; restore it from a copy, or collect it "
                "again with --resume"
            )
    unlisted = sorted({path.name for path in paths} - {line.shard for line in lines})
    if unlisted:
        log(f"{folder}: {', '.join(unlisted)} left out, not in the manifest; see 'expert-speculation verify'")
    planned = planned_shards(run_dir) if (run_dir / PLAN_NAME).exists() else []
    if len(lines) < len(planned):
        log(f"{run_dir}: {len(lines)} of {len(planned)} planned shards are there; finish the run with --resume")
    return [open_shard(folder / line.shard, line) for line in lines]


def _checked(columns: Collection[str]) -> frozenset[str]:
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; choose of {', '.join(COLUMNS)}")
    return frozenset(columns)
