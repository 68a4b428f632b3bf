"""Text files as numbered lines, plain, gzip or zstd by their first bytes, and gzip files of JSON lines."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from groundwork.errors import ConfigurationError
from traces.interchange.values import as_text

MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
ZSTD_CHUNK = 1 << 16


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers, counted from 1; memory: one line.

    Raises ConfigurationError for a file that can not be read, is damaged or cut off, or is not packed as it is named.
    """
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ConfigurationError(
            f"{path}: damaged or cut off after line {number} ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{path}: can not be read ({error.strerror or error}); name a readable file"
        ) from error


def _open(path: Path) -> IO[bytes]:
    """Open a text file for reading, unpacked; reading on raises EOFError where the archive is cut off."""
    file = path.open("rb")
    head = file.read(4)
    file.seek(0)
    packing = next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)
    promised = SUFFIXES.get(path.suffix)
    if promised is not None and promised != packing:
        file.close()
        raise ConfigurationError(f"{path}: is named {path.suffix} but holds no {promised}; rename it or fetch it again")
    if packing == "gzip":
        file.close()
        return gzip.open(path)  # type: ignore[return-value]
    return io.BufferedReader(_Zstd(file)) if packing == "zstd" else file


class _Zstd(io.RawIOBase):
    """Zstd frames unpacked; raises EOFError where the last one is cut off, which zstandard's own reader lets pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest, self._ready = b"", memoryview(b"")  # packed bytes after a frame's end; unpacked, not yet handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._file.read(ZSTD_CHUNK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            self._rest = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def default_dataset(path: Path) -> str:
    """Return what a data set is called where nothing says: the file's name up to its first dot."""
    return as_text(path.name.split(".")[0])


class JsonLinesWriter:
    """Writes a gzip file of JSON lines, the same bytes for the same values; memory: one line."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("wb")
        packed = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, compresslevel=4, mtime=0)
        self._file = io.BufferedWriter(packed, 1 << 16)

    def __enter__(self) -> "JsonLinesWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()

    def write(self, values: dict[str, Any]) -> None:
        """Add one line."""
        self._file.write(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
