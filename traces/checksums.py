"""The checksums of a shard: of the whole file, of its footer, and of every column chunk, as a manifest line holds them.

The parts let a reader check just the bytes that it decodes, headers included, which Parquet's own page checksums leave
out.
"""

import hashlib
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from traces.claims import check_footer, chunk_range

FOOTER_LIMIT = 2**20  # bytes, or FOOTER_SHARE of a larger file; parsed, a footer can take 150 times as much
FOOTER_SHARE = 1 / 64  # a row group takes 1.5 kB of footer and a megabyte or more of data
_MAGIC = b"PAR1"


class Checksums(NamedTuple):
    """The fields of a manifest line that vouch for a file's bytes."""

    bytes: int
    sha256: str
    footer_blake2b: str
    chunk_crc32: tuple[tuple[int, ...], ...]  # [row group][column]


def checksums(path: Path) -> Checksums:
    """Return the checksums of a shard; raises ValueError or pyarrow's errors where it has no sound footer."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        footer = read_footer_bytes(file)
        metadata = parse_metadata(footer)
        crc = tuple(
            tuple(zlib.crc32(read_chunk(file, group.column(column))) for column in range(metadata.num_columns))
            for group in map(metadata.row_group, range(metadata.num_row_groups))
        )
        return Checksums(file.seek(0, 2), digest, footer_digest(footer), crc)


def read_footer_bytes(file: BinaryIO) -> bytes:
    """Return the footer with its length and the closing magic; raises ValueError where there is none."""
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    end = file.read()
    length = int.from_bytes(end[:4], "little") + 8
    if end[4:] != _MAGIC or length > size:
        raise ValueError("it does not end in a Parquet footer")
    if length > max(FOOTER_LIMIT, FOOTER_SHARE * size):
        raise ValueError(f"its footer takes {length} bytes")
    file.seek(size - length)
    return file.read()


def parse_metadata(footer: bytes) -> pq.FileMetaData:
    """Return Parquet's metadata from a footer's bytes; raises ValueError or pyarrow's errors where it has none."""
    check_footer(footer)
    return pq.read_metadata(pa.BufferReader(footer))


def footer_digest(footer: bytes) -> str:
    """Return the blake2b of a footer's bytes."""
    return hashlib.blake2b(footer, digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_chunk(file: BinaryIO, column: pq.ColumnChunkMetaData) -> memoryview:
    """Return the bytes of a column chunk; raises ValueError where the file ends before.

    They lie in Arrow's memory, which stays with the process when freed: fresh pages cost as much as reading.
    """
    start, length = chunk_range(column)
    buffer = memoryview(pa.allocate_buffer(length)).cast("B")
    file.seek(start)
    if file.readinto(buffer) != length:  # type: ignore[attr-defined]
        raise ValueError(f"the file ends within a column of {length} bytes")
    return buffer
