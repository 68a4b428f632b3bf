"""Holds what a Parquet file claims, in its footer, page headers and dictionaries, against what it may have, before
memory is spent on it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from traces.pages import DATA_PAGE, DICTIONARY_PAGE, PLAIN, walk_pages
from traces.thrift import read_struct

# parquet.thrift: bytes of a value by type; codecs, encodings and fields of a column chunk that ours may have
_VALUE_BYTES = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8}
_TEXT, _FIXED = 6, 7
_CODECS = range(8)
_ENCODINGS = {0, 2, 3, 4, 5, 6, 7, 8, 9}
_FIELDS = {*range(1, 14), 16}


class _Leaf(NamedTuple):
    """A column in a footer's schema, and how deep its definition and repetition levels go."""

    kind: int
    definition: int
    repetition: int


def check_footer(footer: bytes) -> None:
    """Raise ValueError unless every column chunk that a footer lists is one that Arrow can be asked about.

    `footer` ends with its length and the closing magic. Arrow would end the process otherwise; see `thrift`.
    """
    try:
        fields, end = read_struct(footer, 0)
        root, *elements = fields[2]
        rest = iter(elements)
        leaves = [leaf for _ in range(root[5]) for leaf in _leaves(rest)]
        sound = end == len(footer) - 8 and all(
            len(group[1]) == len(leaves) and all(map(_is_sound, group[1], leaves)) for group in fields[4]
        )
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError("its footer is not one of Parquet's") from error
    if not sound:
        raise ValueError("its footer lists columns of an unknown kind")


def _leaves(elements: Iterator[dict[int, Any]], definition: int = 0, repetition: int = 0) -> Iterator[_Leaf]:
    """Yield the columns of the next schema element; 1 is optional, 2 repeated."""
    element = next(elements, {})
    definition, repetition = definition + (element[3] > 0), repetition + (element[3] == 2)
    if element.get(5):
        for _ in range(element[5]):
            yield from _leaves(elements, definition, repetition)
    else:
        yield _Leaf(element[1], definition, repetition)


def _is_sound(chunk: dict[int, Any], leaf: _Leaf) -> bool:
    """Say whether a column chunk is in this file, not encrypted, of its column's type, and known in all it names."""
    metadata = chunk[3]
    statistics, sizes = metadata.get(12, {}), metadata.get(16, {})
    extremes = [statistics[field] for field in (1, 2, 5, 6) if field in statistics]
    return (
        chunk.keys() <= {2, 3}
        and metadata.keys() <= _FIELDS
        and metadata[1] == leaf.kind
        and metadata[4] in _CODECS
        and _ENCODINGS.issuperset(metadata[2])
        and all(_is_value(extreme, leaf.kind) for extreme in extremes)
        and len(sizes.get(2, [])) in (0, leaf.repetition + 1)
        and len(sizes.get(3, [])) in (0, leaf.definition + 1)
    )


def _is_value(statistic: bytes, kind: int) -> bool:
    """Say whether a statistic is of its column's type; raises UnicodeDecodeError for a text that is none."""
    if kind == _TEXT:
        statistic.decode()
    return kind in (_TEXT, _FIXED) or len(statistic) == _VALUE_BYTES[kind]


def chunk_range(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Return the offset and length in bytes of a column chunk, dictionary page included."""
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    return start, column.total_compressed_size


def check_chunks(metadata: pq.FileMetaData, data_bytes: int) -> None:
    """Raise ValueError unless row groups add up to the file's rows and column chunks lie within the file's data."""
    rows = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        rows += group.num_rows
        for start, length in (chunk_range(group.column(number)) for number in range(metadata.num_columns)):
            if start < 0 or length <= 0 or start + length > data_bytes:
                raise ValueError(f"a column at bytes {start} to {start + length} of {data_bytes}")
    if rows != metadata.num_rows:
        raise ValueError(f"row groups of {rows} rows in all where its footer says {metadata.num_rows}")


def check_pages(chunk: memoryview, column: pq.ColumnChunkMetaData, limit: int) -> int:
    """Return the bytes to which a chunk's pages say they decompress; raises ValueError where they exceed `limit`.

    A dictionary's entries take 2 bytes and more each; Arrow would make room for any number of them.
    """
    claimed = 0
    for page in walk_pages(chunk):
        claimed += page.uncompressed
        if page.kind == DICTIONARY_PAGE and page.values * 2 > page.uncompressed:
            raise ValueError(f"{column.path_in_schema} claims {page.values} values in {page.uncompressed} bytes")
    limit = min(column.total_uncompressed_size, limit)
    if claimed > limit:
        raise ValueError(f"{column.path_in_schema} claims {claimed} bytes, wanted {limit} at most")
    return claimed


def check_plain(chunk: memoryview) -> None:
    """Raise ValueError where values of a chunk do not stand there one by one: a dictionary lets few bytes be many."""
    for page in walk_pages(chunk):
        if (page.kind, page.encoding) != (DATA_PAGE, PLAIN):
            raise ValueError(f"a page of kind {page.kind}, encoding {page.encoding}, where only plain values belong")


def check_strings(column: pa.ChunkedArray, limit: int) -> int:
    """Return the bytes that a dictionary-encoded column's strings take once each stands for itself.

    Raises ValueError where they exceed `limit`, pyarrow's errors where they are not UTF-8 or not in the dictionary.
    """
    taken = 0
    for chunk in column.chunks:
        chunk.validate(full=True)
        chunk.dictionary.validate(full=True)
        taken += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    if taken > limit:
        raise ValueError(f"its strings take {taken} bytes, wanted {limit} at most")
    return taken
