"""JSON that people can read and that stays small: one line for each key and for each row of numbers.

`json.dumps` with an indent puts every number on a line of its own, behind as many blanks as it is deep: five times the
size where most of it is numbers.
"""

import json
from collections.abc import Mapping
from typing import Any


def dumps_rows(value: Any, depth: int = 0) -> str:
    """Return `value` as JSON: objects indented, lists of lists with one line for each of the inner ones.

    What JSON has no form for is written as its `str`. `depth` is how far the lines after the first are indented.
    """
    inner, outer = "  " * (depth + 1), "  " * depth
    if isinstance(value, Mapping) and value:
        lines = [f"{inner}{_compact(_key(key))}: {dumps_rows(each, depth + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{outer}}}"
    if isinstance(value, list | tuple):
        if any(isinstance(each, Mapping) for each in value):
            lines = [inner + dumps_rows(each, depth + 1) for each in value]
            return "[\n" + ",\n".join(lines) + f"\n{outer}]"
        if any(isinstance(each, list | tuple) for each in value):
            return "[\n" + ",\n".join(inner + _compact(each) for each in value) + f"\n{outer}]"
    return _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _key(key: Any) -> str:
    """Return what `json` makes of a key: a string stays, 2 is `"2"`, None is `"null"`."""
    return key if isinstance(key, str) else json.dumps(key, default=str)
