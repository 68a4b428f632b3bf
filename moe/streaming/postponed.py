"""A model whose weights transformers is about to read: all else of loading is done, by transformers' own loader.

So whatever decides what a weight becomes (dtype, renaming, joining of experts, quantising) is decided once for models
that are loaded whole and for those that are read layer by layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo


@dataclass(frozen=True)
class Postponed:
    """The model on the meta device, the safetensors files of its checkpoint, and how tensors are to be converted."""

    model: PreTrainedModel
    files: tuple[Path, ...]
    config: LoadStateDictConfig


@contextmanager
def postponed_reading() -> Iterator[list[Postponed]]:
    """Have `from_pretrained`, inside this context, return a model on the meta device and add it to what is yielded."""
    postponed: list[Postponed] = []
    patched: Any = PreTrainedModel
    stock = {name: patched.__dict__[name] for name in ("_load_pretrained_model", "_finalize_model_loading")}

    def hold(
        model: Any,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str],
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, None]:
        postponed.append(Postponed(model, tuple(map(Path, checkpoint_files)), load_config))
        model._weight_conversions = []  # what reading would leave there, and quantisers look at
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None

    def leave(
        model: PreTrainedModel, load_config: LoadStateDictConfig, loading_info: LoadStateDictInfo
    ) -> LoadStateDictInfo:
        return loading_info

    patched._load_pretrained_model, patched._finalize_model_loading = staticmethod(hold), staticmethod(leave)
    try:
        yield postponed
    finally:
        for name, method in stock.items():
            setattr(patched, name, method)
