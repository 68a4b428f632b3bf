"""Which sequences of two runs are the same text: equal token ids, or equal token strings where ids are not known.

A text is known by a digest of 16 bytes, so that memory grows with sequences, not with tokens. Where a text occurs
several times, its n-th occurrence in one run is matched with its n-th in the other.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.reader import TraceDataset
from traces.shards import strings

DIGEST_BYTES = 16
UNKNOWN_ID = -1
NO_DIGEST = b""  # neither ids nor strings are known: no text to compare


@dataclass(frozen=True, eq=False)
class Matches:
    """Positions in the two indexes of the N pairs of equal texts, rising in the first, and by what they were found."""

    first_N: NDArray[np.int64]
    second_N: NDArray[np.int64]
    by: str  # `token ids` or `token strings`


def match_texts(first: TraceDataset, second: TraceDataset) -> Matches:
    """Pair the sequences of two runs that hold the same text; reads only token ids, or strings where ids lack."""
    by_ids = [_digests(dataset, by_strings=False) for dataset in (first, second)]
    if all(_known(digest_S).all() for digest_S in by_ids):
        return Matches(*_pairs(*by_ids), by="token ids")
    return Matches(*_pairs(*(_digests(dataset, by_strings=True) for dataset in (first, second))), by="token strings")


def _digests(dataset: TraceDataset, *, by_strings: bool) -> NDArray[np.bytes_]:
    """Return one digest per sequence of the index, empty where no id (or no string) of it is known."""
    index = dataset.index
    digest_S = np.full(len(index), NO_DIGEST, dtype=f"S{DIGEST_BYTES}")
    for positions in dataset.order():  # by row group
        shard, row_group = dataset.shards[index.shard_S[positions[0]]], int(index.row_group_S[positions[0]])
        column = shard.table(row_group, ["token" if by_strings else "token_id"]).column(0)
        values = strings(column) if by_strings else column.to_numpy().astype("<i4")
        for position in positions.tolist():
            start = int(index.row_offset_S[position])
            digest_S[position] = _digest(values[start : start + int(index.num_tokens_S[position])])
    return digest_S


def _digest(text: list[str] | NDArray[np.int32]) -> bytes:
    """Return a text's digest; its last byte is never 0, which numpy's byte strings do not keep."""
    if isinstance(text, list):
        if not any(text):
            return NO_DIGEST
        content = "\0".join(text).encode()
    else:
        if (text == UNKNOWN_ID).all():
            return NO_DIGEST
        content = text.tobytes()
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    return digest[:-1] + bytes([digest[-1] | 1])


def _known(digest_S: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    return np.asarray(digest_S != NO_DIGEST)


def _pairs(first_S: NDArray[np.bytes_], second_S: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of equal digests, the n-th occurrence with the n-th."""
    positions = [np.flatnonzero(_known(digest_S)) for digest_S in (first_S, second_S)]
    _, code = np.unique(np.concatenate([first_S[positions[0]], second_S[positions[1]]]), return_inverse=True)
    codes = np.split(code.astype(np.int64), [len(positions[0])])
    most = max(len(first_S), len(second_S)) + 1
    keys = [each * most + _occurrence(each) for each in codes]
    _, first_N, second_N = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    first_N, second_N = positions[0][first_N], positions[1][second_N]
    order = np.argsort(first_N)
    return first_N[order], second_N[order]


def _occurrence(code_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many equal codes stand before each."""
    order = np.argsort(code_S, kind="stable")
    ranked = code_S[order]
    starts = np.flatnonzero(np.diff(ranked, prepend=-1))
    occurrence_S = np.empty(len(code_S), dtype=np.int64)
    occurrence_S[order] = np.arange(len(code_S)) - np.repeat(starts, np.diff(starts, append=len(code_S)))
    return occurrence_S
