"""A model of which one layer at a time has weights: what a checkpoint holds for each, read and given up again.

Everything outside of the layers (embeddings, positions, the last normalisation) is read once. So are, with the first
reading of their layer, the modules that are asked before their layer's turn: routers, and the norms before them.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)

from groundwork.errors import ConfigurationError
from moe import quantize
from moe.checksums import read_index
from moe.router_site import refusal
from moe.routers import RouterLayout
from moe.source import Source, refusing
from moe.split_experts import PerExpertLinears
from moe.streaming.files import CheckpointFiles
from moe.streaming.postponed import Postponed

_QUANTISED_STATES = ("state", "quant_state", "compute_dtype", "compute_type_is_set")  # of bitsandbytes' linear layers


class LayeredModel:
    """The layers of a postponed model, by number, and their weights from `source`, quantised as `mode` says.

    `layers` holds every layer, those without experts too. Loading and releasing different layers may go on in different
    threads. Raises ConfigurationError where the model's routers are not all in one stack of layers, and, wherever
    tensors are read, for files that can not be used and tensors that are missing or of another shape;
    ExpertSpeculationError where quantising did not work.
    """

    def __init__(self, postponed: Postponed, layout: RouterLayout, source: Source, mode: str) -> None:
        self.model: PreTrainedModel = postponed.model
        self.layout = layout
        self._source, self._mode = source, mode
        self._place = layout.place
        if any(not site.name.startswith(f"{self._place}.") for site in layout.sites):
            raise refusal(type(self.model).__name__, "its routers are in several stacks of layers")
        self.layers: list[Any] = list(self.model.get_submodule(self._place).children())
        self._config = postponed.config
        self.device = torch.device((postponed.config.device_map or {}).get("", "cpu"))
        self._targets = dict(self.model.state_dict())
        # transformers asks for it at every reading, and quantised layers would be saved, and changed, by answering.
        self.model.state_dict = lambda: self._targets  # type: ignore[method-assign, assignment]
        self._blank = [_Blank(layer) for layer in self.layers]
        self._kept: set[nn.Module] = set()
        self.unexpected: set[str] = set()
        self._keys: dict[int | None, list[tuple[str, str]]] = {each: [] for each in (None, *range(len(self.layers)))}
        with refusing(source, "weights"):
            packed = read_index(source.folder)
            self.files = CheckpointFiles(postponed.files, packed.sums if packed else None)
            self._assign_keys()

    def load_rest(self) -> None:
        """Read what lies outside of the layers, and make the tables that are in no checkpoint."""
        self._make_tables(self.model, self.model)
        outside = [name for name in self._targets if self._layer_of(name) is None]
        self._read(self._keys[None], outside)

    def load(self, index: int) -> None:
        """Read a layer's weights, but for what is kept of it already."""
        keys = [(key, target) for key, target in self._keys[index] if not self._is_kept(target)]
        wanted = [name for name in self._targets if self._layer_of(name) == index and not self._is_kept(name)]
        self._read(keys, wanted)
        layer = self.layers[index]
        if quantize.is_ours(self._mode) and any(isinstance(part, PerExpertLinears) for part in layer.modules()):
            quantize.check_experts(layer, self._mode)

    def read_cold(self, index: int) -> int:
        """Read a layer's part of the checkpoint from the disk, into the page cache alone; returns the bytes."""
        keys = [key for key, _ in self._keys[index]]
        with refusing(self._source, "weights"):
            self.files.forget(keys)
            before = self.files.bytes_read
            self.files.read(keys)
        return self.files.bytes_read - before

    def outside(self) -> dict[str, torch.Tensor]:
        """Return by name what is saved of all that lies outside of the layers, scales with it, tied tensors once."""
        saved: dict[str, torch.Tensor] = {}

        def gather(module: nn.Module, prefix: str) -> None:
            for name, child in module.named_children():
                path = prefix + name
                if f"{self._place}.".startswith(f"{path}."):
                    if path != self._place:
                        gather(child, f"{path}.")
                else:
                    saved.update(child.state_dict(prefix=f"{path}."))
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            saved.update((prefix + name, each) for name, each in own if name not in module._non_persistent_buffers_set)

        gather(self.model, "")
        return {name: each for name, each in saved.items() if name not in self.model.all_tied_weights_keys}

    def release(self, index: int) -> None:
        """Give up a layer's weights, but for what is to be kept of it."""
        self._blank[index].restore(self._kept)

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Keep the tensors that these modules themselves hold, once they are read, for good."""
        self._kept |= set(modules)

    def _read(self, keys: list[tuple[str, str]], wanted: list[str]) -> None:
        folder = self._source.folder
        with refusing(self._source, "weights"):
            self.files.read(key for key, _ in keys)
            tensors = {key: self.files.tensor(key) for key, _ in keys}
            report, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._config)
        report.missing_keys &= set(wanted)
        self.model._adjust_missing_and_unexpected_keys(report)
        missing = sorted(report.missing_keys - self.model.all_tied_weights_keys.keys())
        if missing:
            raise ConfigurationError(
                f"{folder}: the checkpoint lacks {len(missing)} of the model's tensors, first {missing[0]!r}; "
                "copy or download the model again"
            )
        wrong = sorted([name for name, *_ in report.mismatched_keys] + list(report.conversion_errors))
        if wrong:
            raise ConfigurationError(
                f"{folder}: {len(wrong)} of its tensors are not of the shape that config.json says, first "
                f"{wrong[0]!r}; copy or download the model again"
            )
        for name in wanted:
            parameter = self.model.get_parameter_or_buffer(name)
            if parameter.is_floating_point():
                parameter.requires_grad_(False)

    def _make_tables(self, module: nn.Module, owner: PreTrainedModel) -> None:
        """Fill the buffers that are never saved, such as rotary frequencies, each as its own model initialises it."""
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            self._make_tables(child, owner)
        tables = {
            name: table
            for name, table in module._buffers.items()
            if name in module._non_persistent_buffers_set and table is not None
        }
        for name, table in tables.items():
            module._buffers[name] = torch.empty_like(table, device=self.device)
        if tables:
            with torch.no_grad():
                owner._init_weights(module)

    def _assign_keys(self) -> None:
        """Find out which tensors of the checkpoint become, renamed and joined, which layer's."""
        conversions: list[Any] = self._config.weight_mapping or []
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        prefix = self.model.base_model_prefix
        for key in self.files.names():
            target, _ = rename_source_key(key, renamings, converters, prefix, self._targets)
            if target not in self._targets and key in self._targets:
                target, _ = rename_source_key(key, [], [], prefix, self._targets)
            if target in self._targets:
                self._keys[self._layer_of(target)].append((key, target))
            else:
                self.unexpected.add(target)

    def _layer_of(self, name: str) -> int | None:
        if not name.startswith(f"{self._place}."):
            return None
        return int(name.removeprefix(f"{self._place}.").partition(".")[0])

    def _is_kept(self, name: str) -> bool:
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        tensor = module._parameters.get(own, module._buffers.get(own))
        return module in self._kept and tensor is not None and not tensor.is_meta


class _Blank:
    """What the modules of a layer hold before it is read: tensors on the meta device, and states of quantised ones."""

    def __init__(self, layer: nn.Module) -> None:
        self._held = [
            (module, dict(module._parameters), dict(module._buffers), {name: copy.copy(each) for name, each in states})
            for module in layer.modules()
            for states in [[(name, vars(module)[name]) for name in _QUANTISED_STATES if name in vars(module)]]
        ]

    def restore(self, kept: set[nn.Module]) -> None:
        for module, parameters, buffers, states in self._held:
            if module in kept:
                continue
            module._parameters.update(parameters)
            tables = module._non_persistent_buffers_set
            module._buffers.update({name: each for name, each in buffers.items() if name not in tables})
            vars(module).update({name: copy.copy(each) for name, each in states.items()})
