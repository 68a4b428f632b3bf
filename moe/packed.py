"""Packing a model for streaming: its layers quantised once, a file each, with checksums.

What is written is also a checkpoint as transformers saves a quantised model, tensor for tensor, so the folder can be
loaded whole, too. But here one layer at a time is in memory.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from groundwork.atomic import permit_as_new
from groundwork.disk import free_bytes, saying_disk_full
from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device
from groundwork.progress import progress
from moe import stored
from moe.checksums import write_checksums
from moe.description import choose, sketch_model
from moe.load import call_loader
from moe.quantizable import bytes_by_layer, check_quantizable, count_matrices
from moe.routers import RouterLayout, find_routers
from moe.source import Source, find_source, quiet, read_tokenizer
from moe.split_loading import without_splitting
from moe.streaming.layered import LayeredModel
from moe.streaming.postponed import postponed_reading

PACKED_MODES = ("nf4", "nf4-double", "int8")
_BYTES_PER_MATRIX = 3000  # of names, places and states of quantisation: 2,400 in nf4-double, which has most
_BYTES_PER_FILE = 8192  # its header, and what of the disk's last block it leaves empty
_SMALL_FILES = (".json", ".model", ".txt", ".jinja")
_causal_models: Any = AutoModelForCausalLM  # not annotated by transformers


def pack(path: str, folder: Path, *, quantization: str = "nf4", device: str = "auto") -> dict[str, Any]:
    """Quantise the checkpoint `path` layer by layer into the new folder `folder`, which `--model` then takes.

    Returns what its index says: format_version, model, revision, quantization, and files with bytes and sha256. The
    folder appears when it is complete. Raises ConfigurationError as `load_model` does, for a folder that exists and for
    a disk with too little room, and ExpertSpeculationError where the disk fills up all the same.
    """
    choose("--quantization", quantization, PACKED_MODES)
    if folder.exists():
        raise ConfigurationError(f"{folder}: exists already; name a new folder for the packed model")
    target = choose_device(device)
    source = find_source(path)
    sketch, layout = sketch_model(source, "auto")
    if stored.stored_mode(sketch.config):
        raise ConfigurationError(
            f"{source.folder}: the checkpoint is already quantised; stream it as it is, or pack the original one"
        )
    check_quantizable(sketch, layout, quantization, target)
    tokenizer = read_tokenizer(source)
    auto_class = AutoModelForCausalLM if type(sketch.config) in _causal_models._model_mapping else AutoModel
    _check_room(folder, packed_bytes(source, *sketch_model(source, "auto", auto_class), quantization))
    whole = find_source(path, weights=True)
    with postponed_reading() as postponed:
        model, _ = call_loader(auto_class, whole, quantization, False, "auto", target)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    layered = LayeredModel(postponed[0], find_routers(model), whole, quantization)
    facts = {"model": source.name, "revision": source.revision, "quantization": quantization}
    try:
        with saying_disk_full(folder, "free disk space and pack again, or name a folder on another disk"):
            unfinished.mkdir(parents=True)
            _write_weights(layered, unfinished)
            with quiet():
                _write_settings(model, unfinished)
                tokenizer.save_pretrained(unfinished)
            index = write_checksums(unfinished, facts)
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return index


def packed_bytes(source: Source, sketch: PreTrainedModel, layout: RouterLayout, mode: str) -> int:
    """Return about the bytes that the model `sketch`, with its head, takes when packed in a mode: no less.

    The small files are taken to be as large as those of `source`.
    """
    outside, layers = bytes_by_layer(sketch, layout, mode)
    small = sum(path.stat().st_size for path in source.folder.iterdir() if path.suffix in _SMALL_FILES)
    files = _BYTES_PER_FILE * (len(layers) + 8)
    return outside + sum(layers) + _BYTES_PER_MATRIX * count_matrices(sketch, layout) + files + small


def _check_room(folder: Path, needed: int) -> None:
    """Raise ConfigurationError unless so many bytes are free on the folder's disk."""
    free = free_bytes(folder)
    if needed > free:
        raise ConfigurationError(
            f"{folder}: about {needed / 1e6:,.1f} MB are needed there and {free / 1e6:,.1f} MB are free; free some, or "
            "name a folder on another disk"
        )


def _write_weights(layered: LayeredModel, folder: Path) -> None:
    """Write a file for what lies outside of layers, one for each layer, and the index that transformers reads."""
    place = layered.layout.place
    model: Any = layered.model
    weight_map: dict[str, str] = {}
    size = 0

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        model._weight_conversions = without_splitting(model._weight_conversions)  # which reading has just set
        tensors = {key: each.cpu().contiguous() for key, each in revert_weight_conversion(model, tensors).items()}
        save_file(tensors, folder / name, {"format": "pt"})
        permit_as_new(folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
        size += sum(each.nbytes for each in tensors.values())

    layered.load_rest()
    write("outside-layers.safetensors", layered.outside())
    for index in progress(range(len(layered.layers)), description="packing", unit="layer"):
        layered.load(index)
        write(f"layer-{index:05d}.safetensors", layered.layers[index].state_dict(prefix=f"{place}.{index}."))
        layered.release(index)
    listed = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2) + "\n")


def _write_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` writes beside weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
