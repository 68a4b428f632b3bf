"""The sha256 of each safetensors file of a packed model, in `packed.json` beside them, and comparing with it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundwork.atomic import write_json
from groundwork.errors import ConfigurationError
from groundwork.progress import progress

INDEX_NAME = "packed.json"
FORMAT_VERSION = 1
_REMEDY = "make the folder anew with 'expert-speculation pack'"
_LONG = 2**30  # bytes, which take a second or two: progress is shown from here on


@dataclass(frozen=True)
class PackedIndex:
    """What `packed.json` says: the model that was packed, its revision where known, and name -> sha256 of the files."""

    model: str
    revision: str | None
    sums: dict[str, str]


def write_checksums(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the index of all safetensors files in `folder`, with some facts, and return what it holds."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.glob("*.safetensors"))
    }
    index = {"format_version": FORMAT_VERSION, **facts, "files": files}
    write_json(folder / INDEX_NAME, index)
    return index


def read_index(folder: Path) -> PackedIndex | None:
    """Return what the index of a packed model says; None where the folder holds none.

    Raises ConfigurationError for an index that can not be read.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text())
        version = index["format_version"]
        if version != FORMAT_VERSION:
            raise ConfigurationError(f"{path}: has format version {version!r}, not {FORMAT_VERSION}; {_REMEDY}")
        model, revision = index["model"], index["revision"]
        sums = {str(name): str(file["sha256"]) for name, file in index["files"].items()}
        # Runs are put into folders that are called after the model.
        if not isinstance(model, str) or model.rpartition("/")[2] in ("", ".", "..") or "\0" in model:
            raise ValueError(f"{model!r} is no model's name")
        if not isinstance(revision, str | None):
            raise ValueError(f"{revision!r} is no revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path}: is no index of a packed model ({error!r}); {_REMEDY}") from error
    return PackedIndex(model, revision, sums)


def check_folder(folder: Path) -> None:
    """Read every safetensors file of a packed model; a folder without an index is left unread.

    Raises ConfigurationError where one differs from the index, is not in it, or is missing, and for an index that can
    not be read.
    """
    index = read_index(folder)
    if index is None:
        return
    paths = sorted(folder.glob("*.safetensors"))
    missing = sorted(index.sums.keys() - {path.name for path in paths})
    if missing:
        raise ConfigurationError(f"{folder / missing[0]}: is in {INDEX_NAME}, but not in the folder; {_REMEDY}")
    long = sum(path.stat().st_size for path in paths) >= _LONG
    for path in progress(paths, description="comparing checksums", unit="file") if long else paths:
        check_file(path, index.sums)


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
