import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculation.training.epoch import POSITION, START, STOP, Batching, Epoch, Step
from traces.reader import TraceDataset


def rows(step: Step) -> list[tuple[int, int, int]]:
    return [tuple(row[[POSITION, START, STOP]].tolist()) for each in step.micro_batches for row in each.pieces]


@pytest.fixture(scope="module")
def epoch(dataset: TraceDataset) -> Epoch:
    return Epoch(dataset, "train", 10, 3)


def test_an_epoch_holds_every_token_once_in_equal_pieces(dataset: TraceDataset, epoch: Epoch) -> None:
    lengths = epoch.pieces[:, STOP] - epoch.pieces[:, START]
    assert lengths.max() <= 10
    assert epoch.tokens == sum(info.num_tokens for info in dataset.index if info.split == "train")
    for position in np.unique(epoch.pieces[:, POSITION]):
        mine = epoch.pieces[epoch.pieces[:, POSITION] == position]
        edges = [*sorted(mine[:, START].tolist()), int(mine[:, STOP].max())]
        assert edges[0] == 0
        assert edges[-1] == dataset.index.num_tokens_S[position]
        widths = np.diff(edges)
        assert widths.max() - widths.min() <= 1


def test_without_a_longest_piece_sequences_are_whole_and_the_seed_fixes_their_order(dataset: TraceDataset) -> None:
    one, same, other = (Epoch(dataset, "train", None, seed).pieces for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert (one[:, START] == 0).all()
    assert (one[:, STOP] == dataset.index.num_tokens_S[one[:, POSITION]]).all()


@given(
    tokens=st.integers(5, 200),
    micro=st.integers(1, 300),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 4),
    size=st.none() | st.integers(1, 9),
)
def test_steps_are_the_same_tokens_for_any_memory_and_any_number_of_processes(
    epoch: Epoch, tokens: int, micro: int, accumulation: int, processes: int, size: int | None
) -> None:
    batching = Batching(size, tokens, accumulation)
    alone = list(epoch.steps(batching, 0, 10**6))
    steps = list(epoch.steps(batching, 0, micro, processes))
    assert [each.next_piece for each in steps] == [each.next_piece for each in alone]
    assert [each.tokens for each in steps] == [each.tokens for each in alone]
    assert all(each.largest <= micro for each in steps)
    for one, other in zip(alone, steps, strict=True):
        covered = [(place, token) for place, start, stop in rows(other) for token in range(start, stop)]
        assert sorted(covered) == sorted((p, token) for p, start, stop in rows(one) for token in range(start, stop))
    half = steps[len(steps) // 2].next_piece
    assert [rows(each) for each in epoch.steps(batching, half, micro, processes)] == [
        rows(each) for each in steps[len(steps) // 2 + 1 :]
    ]


def test_a_step_comes_as_near_to_its_tokens_as_whole_pieces_do(epoch: Epoch) -> None:
    sizes = [step.tokens for step in epoch.steps(Batching(None, 60, 1), 0, 10**6)]
    assert all(abs(size - 60) <= 5 for size in sizes[:-1])


def test_with_as_many_parts_as_processes_the_micro_batches_are_those_of_one(epoch: Epoch) -> None:
    batching = Batching(4, 0, 2)
    for one, two in zip(epoch.steps(batching, 0, 10**6, 1), epoch.steps(batching, 0, 10**6, 2), strict=True):
        assert [each.number for each in one.micro_batches] == [each.number for each in two.micro_batches]
        assert all(
            np.array_equal(a.pieces, b.pieces) for a, b in zip(one.micro_batches, two.micro_batches, strict=True)
        )


def test_two_processes_share_one_part_about_equally(epoch: Epoch) -> None:
    for step in itertools.islice(epoch.steps(Batching(None, 100, 1), 0, 10**6, 2), 3):
        one, two = step.micro_batches
        assert abs(one.tokens - two.tokens) <= 10


def test_what_is_read_is_what_was_planned(dataset: TraceDataset, epoch: Epoch) -> None:
    micro_batches = [each for step in epoch.steps(Batching(None, 50, 1), 7, 40, 2) for each in step.micro_batches]
    stored = {info.sequence_id: trace for info, trace in zip(dataset.index, dataset.sequences("all"), strict=True)}
    read = list(epoch.read(micro_batches, frozenset({"weights"})))
    assert len(read) == len(micro_batches)
    for micro_batch, batch in zip(micro_batches, read, strict=True):
        assert batch.num_tokens == micro_batch.tokens
        for (place, start, stop), begin in zip(
            micro_batch.pieces[:, [POSITION, START, STOP]].tolist(), batch.offsets.tolist(), strict=False
        ):
            trace = stored[int(dataset.index.sequence_id_S[place])]
            kept = batch.expert_ids_TLK[begin : begin + stop - start]
            assert torch.equal(kept, torch.from_numpy(trace.expert_ids_TLK[start:stop].astype(np.int64)))
            assert batch.routing_weights_TLK is not None
    assert list(epoch.read([], frozenset())) == []
