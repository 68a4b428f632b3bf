"""Saving a quantised copy of a checkpoint, which `--model` then takes: a quarter of the bytes to read and keep."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device
from moe import quantize, stored
from moe.description import choose, sketch_model
from moe.load import read_weights
from moe.quantizable import check_quantizable
from moe.source import find_source, quiet, read_tokenizer

_causal_models: Any = AutoModelForCausalLM  # not annotated by transformers


def save_quantized(path: str, folder: Path, *, quantization: str = "nf4", device: str = "auto") -> None:
    """Quantise the checkpoint `path` and save it, with its head and tokenizer, in the new folder `folder`.

    `quantization` is int8, nf4 or nf4-double. Nothing runs through the model in between: on a CPU bitsandbytes packs
    NF4 weights anew in the first forward pass, and saves them corrupt from then on. The folder appears when it is
    complete. Raises ConfigurationError as `load_model` does, and for a folder that exists.
    """
    choose("quantization", quantization, tuple(mode for mode in quantize.MODES if mode not in ("none", "auto")))
    if folder.exists():
        raise ConfigurationError(f"{folder}: exists already; name a new folder for the quantised copy")
    target = choose_device(device)
    source = find_source(path)
    sketch, layout = sketch_model(source, "auto")
    if stored.stored_mode(sketch.config):
        raise ConfigurationError(f"{source.folder}: the checkpoint is already quantised; copy its folder as it is")
    check_quantizable(sketch, layout, quantization, target)
    tokenizer = read_tokenizer(source)
    whole = type(sketch.config) in _causal_models._model_mapping
    auto_class = AutoModelForCausalLM if whole else AutoModel
    model: Any = read_weights(auto_class, find_source(path, weights=True), quantization, False, "auto", target)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet():
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
