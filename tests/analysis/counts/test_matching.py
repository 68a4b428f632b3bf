"""Which sequences of two runs are the same text, whatever their order, repetitions and knowledge of ids."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from analysis.counts.matching import match_texts
from traces.reader import TraceDataset
from traces.schema import SequenceTrace

Write = Callable[..., TraceDataset]


@pytest.fixture(scope="module")
def sequences(dataset: TraceDataset) -> list[SequenceTrace]:
    return list(dataset.sequences(columns=("weights", "tokens")))


def without_ids(sequence: SequenceTrace, token: str = "") -> SequenceTrace:
    """A sequence whose ids are unknown, its strings the ids written out, or `token` where given."""
    strings = [token or str(each) for each in sequence.token_ids_T.tolist()] if token != "none" else []
    return replace(
        sequence,
        token_ids_T=np.full_like(sequence.token_ids_T, -1),
        tokens_T=strings or [""] * sequence.num_tokens,
    )


def test_a_shuffled_part_of_a_run_finds_its_partners(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    order = np.random.default_rng(0).permutation(len(sequences))[:40]
    second = write_run(dataset.spec, [sequences[place] for place in order])
    matches = match_texts(dataset, second)
    assert matches.by == "token ids"
    assert matches.first_N.tolist() == sorted(order.tolist())
    np.testing.assert_array_equal(order[matches.second_N], matches.first_N)


def test_a_text_that_stands_in_a_run_several_times_is_matched_as_often_as_it_stands_in_both(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    first = write_run(dataset.spec, [sequences[0], sequences[1], sequences[0], sequences[0]])
    second = write_run(dataset.spec, [sequences[2], sequences[0], sequences[0]])
    matches = match_texts(first, second)
    assert list(zip(matches.first_N.tolist(), matches.second_N.tolist(), strict=True)) == [(0, 1), (2, 2)]


def test_a_text_that_differs_in_one_token_or_is_longer_is_another(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    changed = sequences[0].token_ids_T.copy()
    changed[-1] += 1
    shorter = {
        name: None if getattr(sequences[1], name) is None else getattr(sequences[1], name)[:-1]
        for name in ("token_ids_T", "tokens_T", "phase_T", "expert_ids_TLK", "routing_weights_TLK")
    }
    second = write_run(
        dataset.spec, [replace(sequences[0], token_ids_T=changed), replace(sequences[1], **shorter), sequences[2]]
    )
    matches = match_texts(dataset, second)
    assert (matches.first_N.tolist(), matches.second_N.tolist()) == ([2], [2])


def test_where_a_run_knows_no_ids_strings_decide_and_texts_without_either_match_nothing(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    named = [replace(each, tokens_T=[str(number) for number in each.token_ids_T.tolist()]) for each in sequences[:3]]
    first = write_run(dataset.spec, [*named, without_ids(sequences[3], "none")])
    second = write_run(
        dataset.spec, [without_ids(sequences[3], "none"), without_ids(sequences[1]), without_ids(sequences[2], "x")]
    )
    matches = match_texts(first, second)
    assert matches.by == "token strings"
    assert (matches.first_N.tolist(), matches.second_N.tolist()) == ([1], [1])
