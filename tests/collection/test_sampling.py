"""Drawing: a seeded uniform order that does not depend on how much is kept, and skips that are counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from collection import sampling
from collection.datasets import Row, Source
from collection.sampling import draw, first_rows
from collection.settings import CollectSettings
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


def test_every_row_is_equally_likely_to_be_drawn() -> None:
    source = ListSource("a", [str(number) for number in range(10)])
    counts = Counter(row.number for seed in range(1000) for row in first_rows(source, seed, 3)[0])
    # Binomial(1000, 0.3): mean 300, standard deviation 14.5; five of them on either side.
    assert all(228 < counts[number] < 372 for number in range(10))


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
