"""What is decoded and when: a server's schedule, when experts are needed again, and parts of a workload."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from prefetch.workload import Schedule, Workload, read_workload
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset

Make = Callable[..., Workload]
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=7)


def steps_of(schedule: Schedule) -> list[list[tuple[int, int, bool]]]:
    """Sequence, token and whether it is the sequence's first, of every row of every decode step."""
    rows = list(zip(schedule.sequence_R, schedule.token_R, schedule.begins_R, strict=True))
    bounds = schedule.first_row_N
    assert (bounds[0], bounds[-1]) == (0, len(rows))
    return [[tuple(map(int, row)) for row in rows[bounds[n] : bounds[n + 1]]] for n in range(len(bounds) - 1)]


def served(lengths: list[int], batch: int) -> list[list[tuple[int, int, bool]]]:
    """The same, by playing the server."""
    first = [sum(lengths[:sequence]) for sequence in range(len(lengths))]
    waiting, places, steps = deque(range(len(lengths))), [], []
    while waiting or places:
        while waiting and len(places) < batch:
            places.append((waiting.popleft(), 0))
        steps.append([(sequence, first[sequence] + done, done == 0) for sequence, done in sorted(places)])
        places = [(sequence, done + 1) for sequence, done in places if done + 1 < lengths[sequence]]
    return steps


def test_where_a_sequence_ends_the_next_one_takes_its_place(random_workload: Make) -> None:
    schedule = random_workload([3, 1, 2]).schedule(2)
    assert steps_of(schedule) == [
        [(0, 0, True), (1, 3, True)],
        [(0, 1, False), (2, 4, True)],
        [(0, 2, False), (2, 5, False)],
    ]


@given(LENGTHS, st.integers(1, 9))
def test_a_schedule_is_what_a_server_with_so_many_places_does(
    random_workload: Make, lengths: list[int], batch: int
) -> None:
    steps = steps_of(random_workload(lengths, layers=1, experts=2, top_k=1).schedule(batch))
    assert steps == served(lengths, batch)
    assert sorted(token for step in steps for _, token, _ in step) == list(range(sum(lengths)))


def needed_at(workload: Workload, schedule: Schedule) -> list[list[set[int]]]:
    """The experts that each layer needs in each decode step."""
    return [
        [set(workload.expert_ids_TLK[[token for _, token, _ in step], layer].ravel().tolist()) for layer in
         range(workload.shape.num_layers)]
        for step in steps_of(schedule)
    ]  # fmt: skip


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_next_visits_are_those_that_looking_ahead_finds(
    random_workload: Make, lengths: list[int], batch: int, layers: int, seed: int
) -> None:
    workload = random_workload(lengths, layers=layers, experts=5, top_k=2, seed=seed)
    schedule = workload.schedule(batch)
    needed = needed_at(workload, schedule)

    def first_need(expert: int, layer: int, from_step: int) -> int:
        later = (n * layers + layer for n in range(from_step, len(needed)) if expert in needed[n][layer])
        return next(later, len(needed) * layers)

    next_RLK, first_X = workload.next_visits(schedule)
    row = 0
    for n, step in enumerate(steps_of(schedule)):
        for _, token, _ in step:
            for layer in range(layers):
                for k, expert in enumerate(workload.expert_ids_TLK[token, layer]):
                    assert next_RLK[row, layer, k] == first_need(expert, layer, n + 1)
            row += 1
    assert first_X.tolist() == [first_need(expert, layer, 0) for layer in range(layers) for expert in range(5)]
    assert workload.most_needed(schedule) == max(len(each) for step in needed for each in step)


def test_a_workload_too_long_to_look_ahead_in_is_refused(random_workload: Make) -> None:
    workload = random_workload([2])
    endless = replace(workload, shape=RoutingShape(2**31, 6, 2))
    with pytest.raises(ConfigurationError, match="4,294,967,296 visits of layers are more than policy 'belady' counts"):
        endless.next_visits(workload.schedule(1))


@given(LENGTHS, st.integers(0, 60), st.integers(0, 5))
def test_a_part_is_as_many_sequences_as_fit_and_at_least_one(
    random_workload: Make, lengths: list[int], tokens: int, seed: int
) -> None:
    part = random_workload(lengths, layers=1, experts=2, top_k=1).part(tokens, seed)
    taken = [lengths[sequence] for sequence in part]
    assert sorted(set(part.tolist())) == part.tolist()
    assert len(part) == 1 or sum(taken) <= tokens
    if sum(lengths) <= tokens:
        assert taken == lengths


def test_a_part_is_drawn_at_random_and_again_the_same_for_its_seed(random_workload: Make) -> None:
    workload = random_workload([5] * 40)
    drawn = [workload.part(50, seed).tolist() for seed in (0, 0, 1)]
    assert [len(part) for part in drawn] == [10, 10, 10]
    assert drawn[0] == drawn[1] != drawn[2]


def test_some_of_the_sequences_are_a_workload_of_their_own(random_workload: Make) -> None:
    workload = replace(random_workload([3, 1, 2]), datasets=["a", "b", "c"])
    part, kept_T = workload.of(np.array([0, 2]))
    assert kept_T.tolist() == [True, True, True, False, True, True]
    assert (part.lengths_S.tolist(), part.datasets) == ([3, 2], ["a", "c"])
    np.testing.assert_array_equal(part.expert_ids_TLK, workload.expert_ids_TLK[[0, 1, 2, 4, 5]])


def test_a_split_is_read_whole_in_the_order_of_its_sequences(dataset: TraceDataset) -> None:
    workload = read_workload(dataset, "test")
    traces = list(dataset.sequences("test", ()))
    assert 1 < len(traces) < dataset.num_sequences
    np.testing.assert_array_equal(workload.expert_ids_TLK, np.concatenate([each.expert_ids_TLK for each in traces]))
    assert workload.lengths_S.tolist() == [each.num_tokens for each in traces]
    assert workload.datasets == [each.dataset for each in traces]
    assert workload.decoded
    code = read_workload(dataset, "all", ["code"])
    assert set(code.datasets) == {"code"}
    assert len(code.lengths_S) == dataset.num_sequences / 2


def test_prompts_are_no_decoded_tokens(make_traces: Callable[..., TraceDataset]) -> None:
    assert not read_workload(make_traces(12, decoded=False), "all").decoded


def test_a_split_without_sequences_is_refused(make_traces: Callable[..., TraceDataset]) -> None:
    few = make_traces(3)
    empty = next(split for split in ("validation_stop", "validation_fit", "test") if not list(few.sequences(split)))
    with pytest.raises(ConfigurationError, match=f"--split {empty}: holds no sequence of these traces; use --split al"):
        read_workload(few, empty)
