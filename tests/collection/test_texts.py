"""What of a row is its text."""

from typing import Any

import pytest

from collection.texts import as_text, find_fields, only_strings


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is \n", "as it is \n"),
        ("\ufeffafter a byte order mark", "after a byte order mark"),
        (None, ""),
        (3, ""),
        ({"text": "no list"}, ""),
        ([], ""),
        (["One.", "", "Two."], "One.\n\nTwo."),
        ([{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}], "user: a\n\ngpt: b"),
        ([{"content": "no speaker"}, {"role": "user", "content": None}, {"role": "user"}], "no speaker"),
        ([{"role": None, "content": "x"}, 5], "x"),
    ],
)
def test_strings_and_conversations_become_texts_and_nothing_else_does(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_a_group_of_columns_counts_only_in_full() -> None:
    rows = [{"question": "q", "text": "t"}, {"answer": "a"}]
    assert find_fields(rows, (("question", "solution"), ("text",))) == ("text",)
    assert find_fields(rows, (("question", "answer"), ("text",))) == ("question", "answer")
    assert find_fields(rows, (("solution",),)) is None


def test_a_column_is_guessed_only_where_no_other_could_be_meant() -> None:
    assert only_strings([{"a": "x", "n": 1}, {"a": None, "n": 2}]) == ("a",)
    assert only_strings([{"a": "x", "b": "y"}]) is None
    assert only_strings([{"a": "x"}, {"a": 3}]) is None
    assert only_strings([]) is None
