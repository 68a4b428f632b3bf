"""Token text for display: nothing invisible, nothing that reorders its neighbours."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from analysis.tokens import MAX_CHARACTERS, readable, readable_tokens


def test_control_bidi_and_zero_width_characters_are_spelled_out() -> None:
    assert readable("a\u202eb\x00\u200b") == "a⟨202E⟩b⟨0⟩⟨200B⟩"
    assert readable(" \n\t") == " ↵⇥"
    assert readable("<b>&amp;</b>") == "<b>&amp;</b>"  # escaping is the page's work


def test_piles_of_combining_marks_are_cut_and_long_tokens_end_in_an_ellipsis() -> None:
    assert readable("e" + "\u0301" * 5) == "e" + "\u0301" * 3 + "⟨301⟩" * 2
    assert readable("x" * 500) == "x" * MAX_CHARACTERS + "…"
    assert readable("x" * 500, None) == "x" * 500


@given(st.text(max_size=40))
def test_no_text_keeps_an_invisible_character(text: str) -> None:
    assert not [
        c for c in readable(text) if unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")
    ]


def test_raw_tokenizer_pieces_are_turned_back_into_text() -> None:
    assert readable_tokens(["<s>", "Ġthe", "Ċ", "cafÃ©", "âĪļ"]) == ["<s>", " the", "↵", "café", "√"]
    assert readable_tokens(["▁Hello", "▁world"]) == [" Hello", " world"]
    assert readable_tokens(["the", " cat"]) == ["the", " cat"]
