"""Checkpoints of a language-model training: one safetensors file and one JSON file, replaced together or not at all."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """State after a number of steps: tensors by name, and JSON-serialisable facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_checkpoint(output_dir: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary folder and rename it over the previous checkpoint's.

    A kill between the two renames leaves the new checkpoint under its temporary name, where `load_checkpoint` finds it.
    """
    fresh, final, old = (output_dir / f"{FOLDER}{suffix}" for suffix in (".new", "", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, fresh / "state.safetensors")
    with (fresh / "facts.json").open("w") as file:
        json.dump(checkpoint.facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(output_dir: Path) -> Checkpoint | None:
    """Return the latest complete checkpoint, or None where there is none."""
    for suffix in ("", ".new", ".old"):
        folder = output_dir / f"{FOLDER}{suffix}"
        if (folder / "facts.json").exists():
            facts = json.loads((folder / "facts.json").read_text())
            return Checkpoint(load_file(folder / "state.safetensors"), facts)
    return None


def remove_checkpoint(output_dir: Path) -> None:
    """Delete the checkpoints of a finished training."""
    for suffix in ("", ".new", ".old"):
        shutil.rmtree(output_dir / f"{FOLDER}{suffix}", ignore_errors=True)
