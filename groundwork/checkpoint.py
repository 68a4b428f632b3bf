"""A training's state in one safetensors file: tensors by name, and facts as JSON in its header; nothing is pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundwork.atomic import write_bytes
from groundwork.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor


def save_checkpoint(path: Path, tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready facts, all in place or none."""
    import safetensors.torch

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(whole, {"facts": json.dumps(facts)}))


def load_checkpoint(path: Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Return what was saved; raises ConfigurationError when the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path}: damaged checkpoint ({error}); delete it and train again") from error


def refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ConfigurationError, naming each difference, unless a checkpoint was made with the settings wanted now."""
    wanted = json.loads(json.dumps(wanted))
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        shown = ", ".join(f"{name} was {found.get(name)}, now {wanted.get(name)}" for name in differing)
        raise ConfigurationError(
            f"{path}: made with other settings ({shown}); repeat those or choose another --output_dir"
        )
