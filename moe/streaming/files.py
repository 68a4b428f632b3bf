"""The safetensors files of a checkpoint: where each tensor lies, and reading it from the disk before it is asked for.

Tensors are mapped, as transformers maps them: on a CPU the bits of a product can depend on where its factors lie, which
in a mapped file is always the same. A mapping alone would be read page by page in the middle of computing, so the bytes
are read, in order and in large pieces, ahead of their use.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from groundwork.errors import ConfigurationError
from moe.checksums import check_file

_PIECE = 16 * 2**20  # bytes at a time: enough for any disk's full speed


class CheckpointFiles:
    """The tensors of some safetensors files by name; `bytes_read` counts what `read` has read.

    Where there are checksums, by file name, each file is compared with its own when it is first read. Raises
    ConfigurationError where they differ, and for a file that has been cut off since it was opened.
    """

    def __init__(self, paths: Iterable[Path], checksums: dict[str, str] | None = None) -> None:
        self.bytes_read = 0
        self._checksums = checksums
        self._checked: set[Path] = set()
        self._files: dict[str, Any] = {}
        self._places: dict[str, tuple[Path, int, int]] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")  # checks all that is used of the header below
            self._files |= dict.fromkeys(file.keys(), file)
            with path.open("rb") as plain:
                length = int.from_bytes(plain.read(8), "little")
                header = json.loads(plain.read(length))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                first, stop = header[key]["data_offsets"]
                self._places[key] = path, 8 + length + first, 8 + length + stop

    def names(self) -> list[str]:
        return list(self._files)

    def tensor(self, key: str) -> Any:
        """Return the tensor as transformers takes it: read when it is sliced."""
        return self._files[key].get_slice(key)

    def read(self, keys: Iterable[str]) -> None:
        """Bring these tensors into the system's cache; from where they already are there, that takes no disk."""
        by_path: dict[Path, list[tuple[int, int]]] = {}
        for key in keys:
            path, first, stop = self._places[key]
            by_path.setdefault(path, []).append((first, stop))
        buffer = bytearray(_PIECE)
        for path, ranges in by_path.items():
            if self._checksums is not None and path not in self._checked:
                check_file(path, self._checksums)
                self._checked.add(path)
            with _opened(path) as descriptor:
                for first, stop in _joined(sorted(ranges)):
                    while first < stop:
                        piece = memoryview(buffer)[: min(_PIECE, stop - first)]
                        count = os.preadv(descriptor, [piece], first)
                        if count == 0:
                            raise ConfigurationError(f"{path}: became shorter while it was read; copy the model again")
                        first += count
                        self.bytes_read += count

    def forget(self, keys: Iterable[str]) -> None:
        """Have the system drop these tensors from its cache, so that `read` measures the disk.

        Raises ConfigurationError where the system can not be asked to.
        """
        if not hasattr(os, "posix_fadvise"):
            raise ConfigurationError("this system can not drop its page cache, so no disk is measured here")
        for path, first, stop in (self._places[key] for key in keys):
            with _opened(path) as descriptor:
                os.posix_fadvise(descriptor, first, stop - first, os.POSIX_FADV_DONTNEED)


def _joined(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join the ranges that touch each other."""
    first, stop = ranges[0]
    for begin, end in ranges[1:]:
        if begin > stop:
            yield first, stop
            first = begin
        stop = max(stop, end)
    yield first, stop


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
