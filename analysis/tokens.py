"""Token text made safe to look at: what cannot be seen, or would change how its neighbours are read, is spelled out.

Escaping for HTML is the template's and the browser's work (autoescape, textContent); this file removes what no escaping
removes: control characters, bidirectional overrides, zero-width characters, and piles of combining marks.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache

MAX_CHARACTERS = 80  # of one token; longer ones are cut with an ellipsis
MAX_MARKS = 3  # combining marks in a row that are shown; real scripts rarely stack more
VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def readable(text: str, most: int | None = MAX_CHARACTERS) -> str:
    """Return `text` with every invisible or direction-changing character replaced by a visible name of it.

    Of a longer text the first `most` characters are kept; None keeps all.
    """
    shown: list[str] = []
    marks = 0
    for character in text[:most]:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if character in VISIBLE:
            shown.append(VISIBLE[character])
        elif category[0] == "C" or category in ("Zl", "Zp") or marks > MAX_MARKS:
            shown.append(f"⟨{ord(character):X}⟩")
        else:
            shown.append(character)
    return "".join(shown) + ("…" if most is not None and len(text) > most else "")


def readable_tokens(tokens: Sequence[str]) -> list[str]:
    """Return a sequence's tokens for display, with raw byte-level or SentencePiece pieces turned back into text."""
    return [readable(text) for text in token_texts(tokens)]


def token_texts(tokens: Sequence[str]) -> list[str]:
    """Return a sequence's tokens as the text they stand for, not yet safe to show.

    Byte-level BPE pieces are recognised by a leading `Ġ`, SentencePiece pieces by a leading `▁`; bytes that are no
    whole UTF-8 character appear as U+FFFD.
    """
    if any(token.startswith("Ġ") for token in tokens):
        return [_from_byte_level(token) for token in tokens]
    if any(token.startswith("▁") for token in tokens):
        return [token.replace("▁", " ") for token in tokens]
    return list(tokens)


@lru_cache(maxsize=2**17)
def _from_byte_level(token: str) -> str:
    table = _byte_of_character()
    if not all(character in table for character in token):
        return token  # an added token such as <｜begin▁of▁sentence｜>, which is not written in the byte alphabet
    return bytes(table[character] for character in token).decode("utf-8", errors="replace")


@cache
def _byte_of_character() -> dict[str, int]:
    """Invert GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
