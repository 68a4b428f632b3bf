"""What kind of text a token is, from its string alone: digits, punctuation, words of several sorts, and so on."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

KINDS = (
    "control tokens",
    "white space",
    "digits",
    "punctuation",
    "code symbols",
    "function words",
    "capitalised words",
    "lower-case words",
    "non-Latin text",
    "other text",
)
CONTROL = re.compile(r"</?s>|<(pad|unk|bos|eos)>|<[|｜].*[|｜]>|\[[A-Z]+\]", re.DOTALL)
PROSE_MARKS = frozenset(".,;:!?'\"()-–—…‘’“”«»¿¡、。，")
ENGLISH = """
    a about after all also an and any are as at be because been before being between both but by can could did
    do does each either for from had has have he her here him his how i if in into is it its may me might more
    most must my no nor not of on one only or other our over shall she should so some such than that the their
    them then there these they this those though through to under until up upon us was we were what when where
    whether which while who whom whose why will with would yet you your
    """
FUNCTION_WORDS = frozenset(ENGLISH.split())


@dataclass(frozen=True)
class TokenText:
    """What the classes need of a token's text."""

    kind: int  # place in KINDS
    spaced: bool  # begins with white space
    begins_in_word: bool  # its first character other than white space is a letter
    ends_in_word: bool  # its last character is a letter


@lru_cache(maxsize=2**18)
def token_text(text: str) -> TokenText:
    """Return what is known of a token with this text, which is not empty."""
    core = text.strip()
    return TokenText(
        kind=KINDS.index(_kind(core)),
        spaced=text[:1].isspace(),
        begins_in_word=core[:1].isalpha(),
        ends_in_word=text[-1:].isalpha(),
    )


def _kind(core: str) -> str:
    if not core:
        return "white space"
    if CONTROL.fullmatch(core):
        return "control tokens"
    if core.isnumeric():
        return "digits"
    if any(character.isalpha() and not _latin(character) for character in core):
        return "non-Latin text"
    if core.replace("'", "").replace("’", "").isalpha():
        if core.lower() in FUNCTION_WORDS:
            return "function words"
        return "lower-case words" if core.islower() else "capitalised words"
    if any(character.isalnum() or unicodedata.category(character)[0] in "CM" for character in core):
        return "other text"
    return "punctuation" if PROSE_MARKS.issuperset(core) else "code symbols"


def _latin(character: str) -> bool:
    return character.isascii() or unicodedata.name(character, "").startswith("LATIN")
