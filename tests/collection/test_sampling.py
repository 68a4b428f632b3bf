"""Drawing: a seeded uniform order that does not depend on how much is kept, and skips that are counted."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from collection import sampling
from collection.sampling import draw, first_rows, shares
from collection.settings import CollectSettings
from collection.sources import Row, Source
from moe.load import load_tokenizer


class ListSource(Source):
    """Texts from a list."""

    def __init__(self, name: str, texts: list[str]) -> None:
        super().__init__(name, "memory", "none")
        self.texts = texts

    def read(self) -> Iterator[Row]:
        yield from (Row(number, f"row#{number}", text) for number, text in enumerate(self.texts))


def long_texts(count: int, mark: str) -> list[str]:
    return [f"{mark} {number} the river and the stone by the sea" for number in range(count)]


def test_the_order_is_a_permutation_whose_beginning_does_not_depend_on_how_much_is_kept() -> None:
    source = ListSource("a", long_texts(5000, "a"))
    everything, rows = first_rows(source, 3, 10_000)
    assert rows == 5000
    assert sorted(row.number for row in everything) == list(range(5000))
    assert first_rows(source, 3, 7)[0] == everything[:7]
    assert first_rows(source, 4, 7)[0] != everything[:7]
    assert first_rows(ListSource("b", source.texts), 3, 7)[0] != everything[:7]


def test_every_row_is_equally_likely_at_every_place_of_the_order() -> None:
    source = ListSource("a", [str(number) for number in range(10)])
    orders = np.array([[row.number for row in first_rows(source, seed, 4)[0]] for seed in range(1000)])
    for place in range(4):
        assert chisquare(np.bincount(orders[:, place], minlength=10)).pvalue > 1e-4
    # Rows next to each other are no more likely to be drawn together than others: 12 % of the draws hold both.
    pairs = [np.mean([{row, row + 1} <= set(order) for order in orders]) for row in range(9)]
    assert all(abs(pair - 4 * 3 / (10 * 9)) < 0.06 for pair in pairs)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=3), max_size=60),
    seed=st.integers(0, 2**32),
    kept=st.integers(1, 70),
)
def test_an_order_is_one_permutation_for_a_seed_whatever_is_kept(texts: list[str], seed: int, kept: int) -> None:
    source = ListSource("a", texts)
    everything, rows = first_rows(source, seed, 70)
    assert rows == len(texts)
    assert sorted(everything) == list(source.read())
    assert first_rows(source, seed, kept)[0] == everything[:kept]


def test_only_the_rows_that_are_kept_are_held_while_a_source_of_many_streams_by() -> None:
    alive, most = 0, 0

    class Counted(str):
        def __new__(cls, text: str) -> "Counted":
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, text)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Many(Source):
        def read(self) -> Iterator[Row]:
            yield from (Row(number, f"row#{number}", Counted("text")) for number in range(200_000))

    kept, rows = first_rows(Many("many", "memory", "none"), 0, 50)
    assert (len(kept), rows) == (50, 200_000)
    assert most < 60


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(0, 10_000),
    weights=st.lists(st.fractions(Fraction(1, 100), 100, max_denominator=100), min_size=1, max_size=20),
)
def test_shares_follow_the_weights_to_less_than_one_sequence(total: int, weights: list[Fraction]) -> None:
    result = shares(total, weights)
    assert sum(result) == total
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(abs(share - wanted) < 1 for share, wanted in zip(result, exact, strict=True))
    left = [float(wanted - int(wanted)) for wanted in exact]
    raised = [left[index] for index, share in enumerate(result) if share > exact[index]]
    lowered = [left[index] for index, share in enumerate(result) if share < exact[index]]
    assert min(raised, default=1.0) >= max(lowered, default=0.0)


@pytest.mark.parametrize(
    ("total", "weights", "result"),
    [
        (11, [1, 1, 1], [4, 4, 3]),
        (2, [1, 1, 1, 1], [1, 1, 0, 0]),
        (10, [2, 1], [7, 3]),
        (100, [Fraction("0.1"), Fraction("0.2"), Fraction("0.7")], [10, 20, 70]),
        (5, [1, 1000], [0, 5]),
    ],
)
def test_equal_remainders_go_to_the_first(total: int, weights: list[Fraction], result: list[int]) -> None:
    assert shares(total, [Fraction(weight) for weight in weights]) == result


def test_weighted_sources_give_their_shares_and_the_same_order_whoever_else_is_there(
    make_settings: Callable[..., CollectSettings], model_dir: Path
) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    heavy, light = ListSource("heavy", long_texts(40, "h")), ListSource("light", long_texts(40, "l"))
    heavy.weight, light.weight = Fraction(3), Fraction(1, 2)
    both = draw([heavy, light], tokenizer, make_settings(target_traces=14))
    assert [len(each.sequences) for each in both] == [12, 2]
    [alone] = draw([light], tokenizer, make_settings(target_traces=5))
    assert [each.row for each in alone.sequences[:2]] == [each.row for each in both[1].sequences]


def test_shares_differ_by_at_most_one_and_skips_are_counted_by_reason(
    make_settings: Callable[..., CollectSettings], model_dir: Path
) -> None:
    sources: list[Source] = [
        ListSource("a", [*long_texts(9, "a"), "", "short"]),
        ListSource("b", [*long_texts(2, "b"), *long_texts(2, "b"), "  ", long_texts(1, "b")[0]]),
        ListSource("c", long_texts(20, "c")),
    ]
    draws = draw(sources, load_tokenizer(str(model_dir)), make_settings(target_traces=11))
    assert [each.requested for each in draws] == [4, 4, 3]
    assert [len(each.sequences) for each in draws] == [4, 2, 3]
    assert draws[1].facts["skipped"] == {"duplicate": 3, "no text": 1}
    assert (draws[1].rows, draws[1].facts["available"]) == (6, 2)
    for each in draws:
        for sequence in each.sequences:
            assert sequence.key == f"row#{sequence.row}"
            assert 8 <= len(sequence.token_ids_T) <= 64


def test_a_source_with_few_usable_rows_is_read_again_until_it_gives_its_share(
    make_settings: Callable[..., CollectSettings], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short"] * 300 + long_texts(6, "a")
    tokenizer, settings = load_tokenizer(str(model_dir)), make_settings(target_traces=6)
    [roomy] = draw([ListSource("a", texts)], tokenizer, settings)
    monkeypatch.setattr(sampling, "LEAST_CANDIDATES", 1)
    [narrow] = draw([ListSource("a", texts)], tokenizer, settings)
    assert len(narrow.sequences) == 6
    assert [each.row for each in narrow.sequences] == [each.row for each in roomy.sequences]
    assert narrow.skipped == roomy.skipped


def test_only_as_many_texts_are_tokenised_as_are_needed(
    make_settings: Callable[..., CollectSettings], model_dir: Path
) -> None:
    tokenizer, tokenised = load_tokenizer(str(model_dir)), []

    def counting(texts: list[str], **options: object) -> object:
        tokenised.extend(texts)
        return tokenizer(texts, **options)

    draw([ListSource("a", long_texts(3000, "a"))], counting, make_settings(target_traces=20))
    assert len(tokenised) < 40


def test_sequences_equal_after_truncation_count_as_duplicates(
    make_settings: Callable[..., CollectSettings], model_dir: Path
) -> None:
    texts = ["the river and the stone by the sea " * 9 + end for end in ("one", "two")]
    [result] = draw(
        [ListSource("a", texts)], load_tokenizer(str(model_dir)), make_settings(target_traces=2, max_length=16)
    )
    assert len(result.sequences) == 1
    assert result.skipped == {"duplicate": 1}
    assert result.sequences[0].token_ids_T.dtype == np.int32
