"""Where each sequence of a folder is, learned in one pass over the narrow columns: 33 bytes a sequence, whatever its
length.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.faults import COLLECT_AGAIN, Fault, FaultError
from traces.shards import Shard, strings
from traces.splits import ELEMENTARY_SPLITS, split_of

_ARRAYS = {
    "sequence_id": np.uint32,
    "dataset": np.int32,
    "num_tokens": np.int64,
    "split": np.int8,
    "shard": np.int32,
    "row_group": np.int32,
    "row_offset": np.int64,
}


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """Where one sequence is and what it is, without its routing."""

    sequence_id: int
    dataset: str
    num_tokens: int
    split: str
    shard: int  # index into shard_paths
    row_group: int
    row_offset: int  # first row within the row group


class SequenceIndex(Sequence[SequenceInfo]):
    """The sequences of a folder in stored order; fields are also there as arrays, one value a sequence.

    `dataset_S` and `split_S` are indices into `datasets` and ELEMENTARY_SPLITS.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        codes: dict[str, int] = {}
        parts = [part for number, shard in enumerate(shards) for part in _row_groups(shard, number, codes)]
        self.datasets = list(codes)
        columns = {name: np.concatenate([part[name] for part in parts]).astype(t) for name, t in _ARRAYS.items()}
        self.sequence_id_S, self.dataset_S, self.num_tokens_S = (
            columns[name] for name in ("sequence_id", "dataset", "num_tokens")
        )
        self.split_S, self.shard_S, self.row_group_S, self.row_offset_S = (
            columns[name] for name in ("split", "shard", "row_group", "row_offset")
        )

    def __len__(self) -> int:
        return len(self.sequence_id_S)

    @overload
    def __getitem__(self, position: int) -> SequenceInfo: ...
    @overload
    def __getitem__(self, position: slice) -> list[SequenceInfo]: ...
    def __getitem__(self, position: int | slice) -> SequenceInfo | list[SequenceInfo]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        return SequenceInfo(
            sequence_id=int(self.sequence_id_S[position]),
            dataset=self.datasets[self.dataset_S[position]],
            num_tokens=int(self.num_tokens_S[position]),
            split=ELEMENTARY_SPLITS[self.split_S[position]],
            shard=int(self.shard_S[position]),
            row_group=int(self.row_group_S[position]),
            row_offset=int(self.row_offset_S[position]),
        )


def check_shard(shard: Shard) -> Iterator[dict[str, Any]]:
    """Yield each row group's fields; raises FaultError unless sequences are whole and the footer's range."""
    return _row_groups(shard, 0, {})


def _row_groups(shard: Shard, number: int, codes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the arrays of each row group's sequences, numbering the data sets that are new in `codes`."""
    expected = shard.planned.first_sequence
    for group in range(shard.num_row_groups):
        table = shard.table(group, ["sequence_id", "position", "token_id", "dataset"])
        ids, token_ids = table["sequence_id"].to_numpy(), table["token_id"].to_numpy()
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        lengths = np.diff(starts, append=len(ids))
        in_place = np.arange(len(ids)) - np.repeat(starts, lengths)
        whole = np.array_equal(table["position"].to_numpy(), in_place)
        if not whole or not np.array_equal(ids[starts], expected + np.arange(len(starts))):
            problem = f"row group {group} does not hold whole sequences from {expected} on"
            raise FaultError(Fault(shard.path, problem, COLLECT_AGAIN))
        expected += len(starts)
        names = strings(table["dataset"].take(pa.array(starts)))
        yield {
            "sequence_id": ids[starts],
            "dataset": [codes.setdefault(name, len(codes)) for name in names],
            "num_tokens": lengths,
            "split": _splits(shard, group, token_ids, starts, lengths, names),
            "shard": np.full(len(starts), number),
            "row_group": np.full(len(starts), group),
            "row_offset": starts,
        }
    if expected != shard.planned.stop_sequence:
        problem = f"holds sequences up to {expected}, its footer says {shard.planned.stop_sequence}"
        raise FaultError(Fault(shard.path, problem, COLLECT_AGAIN))


def _splits(
    shard: Shard,
    group: int,
    token_ids: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    names: list[str],
) -> list[int]:
    """Return each sequence's split; where nothing is known of the text, its name in the source has to do."""
    tokens: list[str] | None = None
    keys: list[str] = []
    splits = []
    for i, (offset, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        own_ids, own_tokens = token_ids[offset : offset + length], [""]
        if (own_ids == -1).all():
            if tokens is None:
                table = shard.table(group, ["token", "sequence_key"])
                tokens = strings(table["token"])
                keys = strings(table["sequence_key"].take(pa.array(starts)))
            own_tokens = tokens[offset : offset + length]
            if not any(own_tokens):
                own_tokens = [names[i], keys[i]]
        splits.append(ELEMENTARY_SPLITS.index(split_of(own_ids, own_tokens)))
    return splits
