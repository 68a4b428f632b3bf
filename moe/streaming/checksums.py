"""The sha256 of each safetensors file of a packed model, in `packed.json` beside them, and comparing with it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from groundwork.atomic import write_json
from groundwork.errors import ConfigurationError

INDEX_NAME = "packed.json"
FORMAT_VERSION = 1
_REMEDY = "make the folder anew with 'expert-speculation pack'"


def write_checksums(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the index of all safetensors files in `folder`, with some facts, and return what it holds."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.glob("*.safetensors"))
    }
    index = {"format_version": FORMAT_VERSION, **facts, "files": files}
    write_json(folder / INDEX_NAME, index)
    return index


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Return name -> sha256 of a packed model's files; None where the folder holds none.

    Raises ConfigurationError for an index that can not be read.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text())
        version, sums = (
            index["format_version"],
            {str(name): str(file["sha256"]) for name, file in index["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path}: is no index of a packed model ({error!r}); {_REMEDY}") from error
    if version != FORMAT_VERSION:
        raise ConfigurationError(f"{path}: has format version {version!r}, not {FORMAT_VERSION}; {_REMEDY}")
    return sums


def check_file(path: Path, sums: dict[str, str]) -> None:
    """Read a whole file; raises ConfigurationError unless its sha256 is the one in `sums`."""
    if path.name not in sums:
        raise ConfigurationError(f"{path}: is not in {INDEX_NAME}; {_REMEDY}")
    found = sha256(path)
    if found != sums[path.name]:
        raise ConfigurationError(
            f"{path}: its sha256 is {found[:16]}..., and {INDEX_NAME} says {sums[path.name][:16]}...; {_REMEDY}"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
