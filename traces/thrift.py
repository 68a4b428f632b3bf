"""Reads Thrift's compact protocol, in which Parquet writes footers and page headers: structs as dicts by field number.

Needed because Arrow ends the whole process where a footer names a codec, type or column that there is not, instead of
raising an error (pyarrow 26); and to walk pages without it. Binary fields are bytes; doubles are not needed and None.
Memory and time are in proportion to the bytes read. Source: thrift-compact-protocol.md of Apache Thrift.
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12


def read_struct(data: bytes | memoryview, at: int) -> tuple[dict[int, Any], int]:
    """Return a struct's fields by number, and where it ends.

    Raises IndexError where the data ends before or is no struct, RecursionError where it is nested too deeply.
    """
    fields: dict[int, Any] = {}
    number = 0
    while data[at] != 0:
        delta, kind = data[at] >> 4, data[at] & 15
        at += 1
        if delta:
            number += delta
        else:
            number, at = _read_integer(data, at)
        if number in fields:
            raise IndexError(f"field {number} twice")
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _read_value(data, at, kind)
    return fields, at + 1


def _read_value(data: bytes | memoryview, at: int, kind: int) -> tuple[Any, int]:
    if _I16 <= kind <= _I64:
        if data[at] < 128:  # one byte, as most are
            return (data[at] >> 1) ^ -(data[at] & 1), at + 1
        return _read_integer(data, at)
    if kind == _STRUCT:
        return read_struct(data, at)
    if kind == _BINARY:
        length, at = _read_varint(data, at)
        return bytes(data[at : at + length]), at + length
    if kind == _LIST:
        return _read_list(data, at)
    if kind in (_BYTE, _DOUBLE):
        return None, at + (1 if kind == _BYTE else 8)
    raise IndexError(f"no Thrift type {kind} in Parquet")


def _read_list(data: bytes | memoryview, at: int) -> tuple[list[Any], int]:
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _read_varint(data, at)
    values = []
    for _ in range(count):
        if kind in (_TRUE, _FALSE):  # a byte each
            value, at = data[at] == _TRUE, at + 1
        else:
            value, at = _read_value(data, at, kind)
        values.append(value)
    return values, at


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise IndexError("a number longer than 64 bits")


def _read_integer(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at
