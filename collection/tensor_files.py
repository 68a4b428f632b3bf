"""Tensors in a file that is read back later: what is read is what was written, or an error."""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_CHECKSUMS = "crc32"  # in the file's metadata: by name, of dtype, shape and bytes, since safetensors has none


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write contiguous tensors, by name, to a file on the disk; raises OSError, or SafetensorError with its words."""
    path.parent.mkdir(exist_ok=True)
    checksums = {name: _checksum(name, tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {_CHECKSUMS: json.dumps(checksums)})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name; raises ValueError where they are not those that were written, or OSError.

    A file without checksums is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            checksums = json.loads((file.metadata() or {})[_CHECKSUMS])
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error
    if checksums != {name: _checksum(name, tensor) for name, tensor in tensors.items()}:
        raise ValueError("its tensors differ from their checksums")
    return tensors


def _checksum(name: str, tensor: torch.Tensor) -> int:
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(head))
