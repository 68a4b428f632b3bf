"""Decodes the list columns of a shard page by page, three to four times as fast as Arrow reads lists.

Arrow rebuilds every list from its repetition levels; ours all have the same length, so only the values matter. The
writer stores them as byte-stream-split zstd pages (Parquet format 2.11: the first bytes of all values of a page, then
the second bytes ...), so a page is decompressed and its byte planes are laid side by side. Sizes are checked against
what the footer implies before anything is allocated, and each page against its checksum. `verify` reads the same
columns through Arrow as well and compares.
"""

import functools
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.thrift import read_struct

THREADS = 4  # more do not help: the copies share the memory bus
DATA_PAGE, DICTIONARY_PAGE = 0, 2  # parquet.thrift: PageType
PLAIN, BYTE_STREAM_SPLIT = 0, 9  # Encoding
_CODEC, _ZSTD_MAGIC = pa.Codec("zstd"), b"\x28\xb5\x2f\xfd"


class Page(NamedTuple):
    """One page as it stands in a column chunk; `values` and `encoding` are -1 unless it is of data or a dictionary."""

    kind: int
    values: int
    encoding: int
    uncompressed: int  # bytes
    body: memoryview


def is_split(chunk: memoryview) -> bool:
    """Say by its first page whether `decode_lists` can decode a column chunk: true for all that our writer writes.

    The footer says it too, but Arrow, asked for a codec that there is not, ends the process (pyarrow 26).
    """
    page = next(walk_pages(chunk, trusted=True), None)
    if page is None or (page.kind, page.encoding) != (DATA_PAGE, BYTE_STREAM_SPLIT):
        return False
    return bytes(page.body[:4]) == _ZSTD_MAGIC


def decode_lists(
    chunk: memoryview, num_values: int, dtype: np.dtype[Any], physical_bytes: int, *, trusted: bool
) -> NDArray[Any]:
    """Return the values of a column chunk, flat; `physical_bytes` is what Parquet stores per value (4 for small ids).
    Pages of a `trusted` chunk, whose bytes the manifest vouches for, are not compared with their checksums again.

    Raises ValueError unless the chunk is whole data pages of exactly `num_values` values. `dtype` has one or two bytes.
    """
    memory = pa.allocate_buffer(num_values * dtype.itemsize)  # fresh memory costs as much as zstd
    values = np.frombuffer(memory, f"<u{dtype.itemsize}")  # float16 too is put together as integers
    parts = []
    done = 0
    for page in walk_pages(chunk, trusted=trusted):
        levels = page.uncompressed - page.values * physical_bytes
        if (page.kind, page.encoding) != (DATA_PAGE, BYTE_STREAM_SPLIT) or not 0 <= page.values <= num_values - done:
            raise ValueError(f"a page of kind {page.kind}, encoding {page.encoding}, {page.values} values")
        if not 0 <= levels <= 64 + page.values // 2:  # two levels of at most a bit a value
            raise ValueError(f"a page of {page.values} values claims {page.uncompressed} bytes")
        parts.append((page, levels, values[done : done + page.values]))
        done += page.values
    if done != num_values:
        raise ValueError(f"{done} values, its footer says {num_values}")
    for _ in _threads(os.getpid()).map(_decode_page, parts):
        pass
    return values.view(dtype)


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked worker inherits a pool without any. zstd and numpy release the GIL."""
    return ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), f"pages of {process}")


def _decode_page(part: tuple[Page, int, NDArray[Any]]) -> None:
    page, levels, own = part
    raw = np.frombuffer(_CODEC.decompress(page.body, page.uncompressed), np.uint8)
    low, high = raw[levels:][: page.values], raw[levels + page.values :][: page.values]
    if own.itemsize == 1:
        own[:] = low
    else:
        np.left_shift(high, 8, out=own, dtype=own.dtype)
        np.bitwise_or(own, low, out=own)


def walk_pages(chunk: memoryview, *, trusted: bool = False) -> Iterator[Page]:
    """Yield the pages of a column chunk, bodies still compressed; raises ValueError where a page is not sound.

    Sound means: the header is one, the body lies within the chunk, and its CRC-32, unless `trusted`, is the header's.
    """
    offset = 0
    while offset < len(chunk):
        try:
            header, start = read_struct(chunk, offset)
            kind, uncompressed, compressed = (int(header[field]) for field in (1, 2, 3))
            own = {DATA_PAGE: 5, DICTIONARY_PAGE: 7}.get(kind)
            values, encoding = (int(header[own][field]) for field in (1, 2)) if own else (-1, -1)
        except (KeyError, IndexError, TypeError, RecursionError) as error:
            raise ValueError(f"no page header at byte {offset} of the column") from error
        offset = start + compressed
        if compressed < 0 or offset > len(chunk) or uncompressed < 0:
            raise ValueError(f"a page of {compressed} bytes reaches beyond its column")
        body = chunk[start:offset]
        if not trusted and 4 in header and zlib.crc32(body) != header[4] & 0xFFFFFFFF:
            raise ValueError("a page differs from its checksum")
        yield Page(kind, values, encoding, uncompressed, body)
