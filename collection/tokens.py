"""Token ids as text a person can read: what each token adds to the text that the tokenizer decodes."""

from collections.abc import Iterable
from typing import Any


class TokenText:
    """The strings of a tokenizer's ids, each decoded once.

    A token is decoded behind an ordinary letter, for many tokenizers drop the space of a first word. Bytes that are
    only a part of a character appear as U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._letter: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before = self._decode(self._letter)

    def strings(self, token_ids: Iterable[int]) -> list[str]:
        """Return one string for each id."""
        return [self._known[each] if each in self._known else self._look_up(each) for each in token_ids]

    def _look_up(self, token_id: int) -> str:
        text = self._decode([*self._letter, token_id])
        text = text[len(self._before) :] if text.startswith(self._before) else self._decode([token_id])
        self._known[token_id] = text
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
