"""Where a text file, plain or packed, is not what it should be: not UTF-8, told before it is read, or no JSON lines."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from collection.texts import first_line
from groundwork.errors import ConfigurationError

BLOCK = 1 << 20
ZSTD_BLOCK = 1 << 12  # bytes on disk: unpacked they may be some 20,000 times as many


def require_utf8(path: Path) -> None:
    """Raise ConfigurationError unless the whole file, unpacked, is UTF-8, naming line and byte, and not cut off."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, lines = 0, 1  # bytes and lines up to the block
    for block in _blocks(path):
        seen = decoder.getstate()[0] + block  # a character may lie across two blocks
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = lines + seen[: error.start].count(b"\n")
            raise ConfigurationError(
                f"{path}: byte {before - (len(seen) - len(block)) + error.start} (0x{seen[error.start]:02x}, line "
                f"{line}) is not UTF-8; convert the file to UTF-8, for instance with iconv"
            ) from error
        before += len(block)
        lines += block.count(b"\n")


def bad_json_line(path: Path) -> int | None:
    """Return the number, from 1, of the first line that is neither blank nor a JSON object; None where all are."""
    rest, number = b"", 1
    for block in _blocks(path):
        *lines, rest = (rest + (block or b"\n")).split(b"\n")
        for line in lines:
            if line.strip() and not _is_json_object(line):
                return number
            number += 1
    return None


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, unpacked, and an empty block last."""
    unpack = {".gz": _gzip_blocks, ".zst": _zstd_blocks}.get(path.suffix, _plain_blocks)
    try:
        with path.open("rb") as file:
            yield from unpack(file)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ConfigurationError(
            f"{path}: is damaged or cut off ({first_line(error)}); fetch the file again"
        ) from error
    yield b""


def _plain_blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _gzip_blocks(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        while block := unpacked.read(BLOCK):
            yield block


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Unpack frame after frame; the library's own reader lets a frame pass that is cut off."""
    frame: zstandard.ZstdDecompressionObj | None = None
    while packed := file.read(ZSTD_BLOCK):
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame has no end")
