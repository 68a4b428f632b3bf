"""Files that are either wholly there or not there at all.

Steps: write a temporary file in the target's folder, flush and fsync it, `os.replace` it over the target, fsync the
folder. A reader therefore sees the old content or the new one, never a part. A crash can leave a temporary file
`.<name>.*.tmp` behind. Accepted: the target's permissions are those of a new file, and a link is replaced by a file,
not written through.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; the folder must exist."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            permit_as_new(file.fileno())
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the audited primitive of the protocol
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, obj: object) -> None:
    """Write `obj` as indented JSON to `path` atomically; NaN and infinities are refused, as JSON has none."""
    write_text(path, json.dumps(obj, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def permit_as_new(file: Path | int) -> None:
    """Give a file, or what a descriptor has open, the permissions of a new file.

    mkstemp, and libraries that write a temporary file first (safetensors), leave 0600, which would hide results from a
    group's other users.
    """
    os.chmod(file, 0o666 & ~_umask())  # noqa: PTH101 - takes descriptors, too


def fsync_folder(path: Path) -> None:
    """Make the folder's entries durable, so that a rename in it survives a crash as far as the disk is honest."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
