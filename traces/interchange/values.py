"""Values as sources spell them: JSON, base64 arrays, token ids, strings, phases and layers.

What is not as it must be raises Unusable, so that one bad record does not end an import.
"""

import base64
import binascii
import json
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.interchange.record import Unusable


def parse_json(data: bytes) -> Any:
    """Return the value a JSON text holds; raises Unusable where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unusable("not a record", f"no JSON ({error})") from error


def decode_array(text: object, dtype: str, name: str) -> NDArray[Any]:
    """Return the flat array that a base64 text holds; raises Unusable where it is none."""
    if not isinstance(text, str):
        raise Unusable("not a record", f"{name} is {type(text).__name__}, wanted base64 text")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable("not a record", f"{name} is no base64: {error}") from error
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise Unusable("array size does not fit", f"{name} holds {len(data)} bytes, no whole number of {size}")
    return np.frombuffer(data, dtype)


def encode_array(array: NDArray[Any], dtype: str) -> str:
    """Return an array's values as base64 text, little-endian, in C order."""
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def as_phases(value: object, tokens: int) -> NDArray[np.uint8] | None:
    """Return a source's phase as one number per token: `prefill` or `decode` for all, or a list of 0 and 1."""
    if value is None:
        return None
    if value in ("prefill", "decode"):
        return np.full(tokens, value == "decode", np.uint8)
    if isinstance(value, list) and len(value) == tokens and all(type(each) is int and each in (0, 1) for each in value):
        return np.array(value, np.uint8)
    raise Unusable("not a record", f"phase is {str(value)[:60]}, wanted prefill, decode, or {tokens} numbers 0 and 1")


def phase_value(phase_T: NDArray[np.uint8]) -> str | list[int]:
    """Return phases as `as_phases` reads them."""
    if (phase_T == phase_T[0]).all():
        return "decode" if phase_T[0] else "prefill"
    return [int(each) for each in phase_T]


def as_token_ids(value: object) -> NDArray[np.int32] | None:
    """Return a source's token ids; raises Unusable unless they are a list of integers that fit, -1 where unknown."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(each) is int and -1 <= each < 2**31 for each in value):
        raise Unusable("not a record", "the token ids are no list of integers in -1..2147483647")
    return np.array(value, np.int32)


def as_strings(value: object) -> list[str] | None:
    """Return a source's token strings; raises Unusable unless they are a list of strings."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Unusable("not a record", "the tokens are no list of strings")
    return [as_text(each) for each in value]


def as_layers(value: Any) -> tuple[int, ...] | None:
    """Return a source's `moe_layers`; raises Unusable unless they are rising numbers."""
    if value is None:
        return None
    sound = isinstance(value, list) and value and all(type(each) is int and 0 <= each <= 65535 for each in value)
    if sound and all(a < b for a, b in pairwise(value)):
        return tuple(value)
    raise Unusable("not a record", f"moe_layers is {str(value)[:60]}, wanted rising layer numbers")


def as_text(value: object) -> str:
    """Return a value as a string that UTF-8 can hold: a lone surrogate, which JSON can spell, becomes '?'."""
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
