"""An epoch planned in whole numbers before anything is read: which tokens of which sequence make which step.

Sequences come in the reader's shuffled order, cut into pieces where a predictor wants that. A step takes
`accumulation` parts, each of `batch_size` pieces, or of about `batch_tokens` tokens. A part is cut into micro-batches
that memory allows; several processes deal these out among them, so that together they take the very same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice, tee
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculation.features import RoutingBatch
from traces.reader import SequenceStream, TraceDataset
from traces.schema import SequenceTrace

POSITION, START, STOP, WINDOW = range(4)  # columns of a table of pieces: sequence, its tokens, what is read together
Pieces = NDArray[np.int64]


@dataclass(frozen=True)
class Batching:
    """How pieces become steps; `batch_size` counts pieces and goes before `batch_tokens`."""

    batch_size: int | None
    batch_tokens: int
    accumulation: int


@dataclass(frozen=True)
class MicroBatch:
    """Pieces that go through the module together; `number` is that of its first piece within the step."""

    number: int
    pieces: Pieces

    @property
    def tokens(self) -> int:
        """All its tokens."""
        return int((self.pieces[:, STOP] - self.pieces[:, START]).sum())


@dataclass(frozen=True)
class Step:
    """One optimizer step: every process's micro-batches, and the piece after its last one."""

    micro_batches: list[MicroBatch]
    next_piece: int

    @cached_property
    def tokens(self) -> int:
        """Tokens of the effective batch."""
        return sum(each.tokens for each in self.micro_batches)

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(each.tokens for each in self.micro_batches)


class Epoch:
    """The pieces of one pass over a split in the order of a seed."""

    def __init__(self, dataset: TraceDataset, split: str, longest_piece: int | None, shuffle_seed: int) -> None:
        self._dataset = dataset
        generator = np.random.default_rng((shuffle_seed, 1))
        tables = [np.empty((0, 4), np.int64)]
        for number, window in enumerate(dataset.order(split, shuffle_seed=shuffle_seed)):
            lengths = dataset.index.num_tokens_S[window]
            columns = (window, np.zeros_like(lengths), lengths, np.full_like(lengths, number))
            table = _cut(np.stack(columns, axis=1), longest_piece)
            tables.append(generator.permutation(table))  # pieces of one text shall not make one step
        self.pieces: Pieces = np.concatenate(tables)

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    @property
    def tokens(self) -> int:
        """Tokens of the whole epoch."""
        return int((self.pieces[:, STOP] - self.pieces[:, START]).sum())

    def steps(self, batching: Batching, first_piece: int, micro_tokens: int, processes: int = 1) -> Iterator[Step]:
        """The steps from a piece on; micro-batches of at most `micro_tokens`, for which pieces are cut where need be.

        Parts are cut further only where there are fewer of them than processes, so that with as many parts as
        processes the micro-batches, and with them the training noise, are those of one process.
        """
        lengths = (self.pieces[:, STOP] - self.pieces[:, START]).tolist()
        shares = -(-processes // batching.accumulation)
        while first_piece < len(lengths):
            micro_batches: list[MicroBatch] = []
            begin = first_piece
            for _ in range(batching.accumulation):
                end = _part_end(lengths, begin, batching)
                micro_batches += _micro_batches(self.pieces[begin:end], begin - first_piece, shares, micro_tokens)
                begin = end
            yield Step(micro_batches, begin)
            first_piece = begin

    def read(self, micro_batches: Iterable[MicroBatch], columns: frozenset[str]) -> Iterator[RoutingBatch]:
        """Reads and packs micro-batches, one at a time and in order; the plan is looked at a window ahead."""
        planned, packed = tee(micro_batches)
        traces = self._traces((row for each in planned for row in each.pieces.tolist()), columns)
        for micro_batch in packed:
            yield RoutingBatch.from_sequences(list(islice(traces, len(micro_batch.pieces))), self._dataset.spec)

    def _traces(self, rows: Iterable[list[int]], columns: frozenset[str]) -> Iterator[SequenceTrace]:
        for _, window in groupby(rows, itemgetter(WINDOW)):
            pieces = list(window)
            positions = np.array([piece[POSITION] for piece in pieces])
            stream = SequenceStream(self._dataset, [positions], columns, None, 0)
            for piece, trace in zip(pieces, stream, strict=True):
                yield _tokens_of(trace, piece[START], piece[STOP])


def _part_end(lengths: list[int], begin: int, batching: Batching) -> int:
    """Where a part ends: after `batch_size` pieces, or where one more would lead further from `batch_tokens`."""
    if batching.batch_size is not None:
        return min(begin + batching.batch_size, len(lengths))
    end, tokens = begin, 0
    while end < len(lengths) and (tokens == 0 or tokens + lengths[end] / 2 <= batching.batch_tokens):
        tokens += lengths[end]
        end += 1
    return end


def _micro_batches(pieces: Pieces, number: int, shares: int, micro_tokens: int) -> list[MicroBatch]:
    """Runs of pieces that fit: first `shares` runs of about equal tokens, then as few as possible of each."""
    found: list[MicroBatch] = []
    middles = np.cumsum(pieces[:, STOP] - pieces[:, START]) - (pieces[:, STOP] - pieces[:, START]) / 2
    total = int((pieces[:, STOP] - pieces[:, START]).sum())
    share_P = np.minimum(middles * shares // max(total, 1), shares - 1)
    for share in range(shares):
        run = _cut(pieces[share_P == share], micro_tokens)
        begin = tokens = 0
        for end, length in enumerate((run[:, STOP] - run[:, START]).tolist()):
            if tokens + length > micro_tokens:
                found.append(MicroBatch(number, run[begin:end]))
                number, begin, tokens = number + end - begin, end, 0
            tokens += length
        if len(run):
            found.append(MicroBatch(number, run[begin:]))
            number += len(run) - begin
    return found


def _cut(pieces: Pieces, longest: int | None) -> Pieces:
    """Each piece in equal ones of at most `longest` tokens."""
    lengths = pieces[:, STOP] - pieces[:, START]
    counts = np.ones_like(lengths) if longest is None else -(-lengths // longest)
    repeated = np.repeat(pieces, counts, axis=0)
    nth = np.arange(len(repeated)) - np.repeat(np.cumsum(counts) - counts, counts)
    all_of, of = np.repeat(lengths, counts), np.repeat(counts, counts)
    begin = np.repeat(pieces[:, START], counts)
    repeated[:, START], repeated[:, STOP] = begin + all_of * nth // of, begin + all_of * (nth + 1) // of
    return repeated


def _tokens_of(trace: SequenceTrace, start: int, stop: int) -> SequenceTrace:
    """Some tokens of a sequence, as if they were all."""
    if (start, stop) == (0, trace.num_tokens):
        return trace
    per_token = ("token_ids_T", "tokens_T", "phase_T", "expert_ids_TLK", "routing_weights_TLK", "router_logits_TLE")
    columns = {name: getattr(trace, name) for name in (*per_token, "lookahead_logits_THLE")}
    cut: dict[str, Any] = {name: each if each is None else each[start:stop] for name, each in columns.items()}
    return replace(trace, **cut)
