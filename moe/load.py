"""Loading a mixture-of-experts model for tracing: its base model, without the language-model head, and its tokenizer.

Everything that can be refused from the configuration is refused before any weight is read. Weights come from
safetensors only, and code from a model's repository is never run.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device, free_memory_bytes
from moe import quantize
from moe.description import DTYPES, choose, count_by_component, describe_model, sketch_model
from moe.quantizable import check_quantizable, quantized_bytes
from moe.routers import RouterLayout
from moe.source import Source, find_source, read_tokenizer, refusing

_SHARE_FOR_WEIGHTS = 0.9  # of the free memory; the rest is for activations

__all__ = ["DTYPES", "LoadedModel", "describe_model", "load_model", "load_tokenizer", "read_weights"]


@dataclass
class LoadedModel:
    """A model ready to be traced, and all that a trace must say of how it was run."""

    model: PreTrainedModel
    tokenizer: Any
    config: Any
    name: str
    revision: str | None
    dtype: str
    quantization: str
    attn_implementation: str | None
    experts_implementation: str | None
    device: torch.device
    tokenizer_hash: str


def load_model(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    language_model: bool = False,
) -> LoadedModel:
    """Load the MoE model in the local folder, or with the hub id, `path`, in evaluation mode and without gradients.

    `dtype="auto"` keeps the checkpoint's; `quantization="auto"` takes, on a GPU, the most precise mode that fits. A
    checkpoint that is quantised already stays so. A `language_model` comes with its head, to generate text. Raises
    ConfigurationError, in one sentence with the remedy, for a folder that is missing or holds no such model, a dense
    model, unknown options, and a hub that can not be reached.
    """
    choose("--dtype", dtype, DTYPES)
    choose("--quantization", quantization, quantize.MODES)
    if attn_implementation:
        choose("--attn_implementation", attn_implementation, ("eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())))
    if experts_implementation:
        known = ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys()))
        choose("--experts_implementation", experts_implementation, known)
    target = choose_device(device)
    source = find_source(path)
    sketch, layout = sketch_model(source, dtype)
    stored = quantize.stored_mode(sketch.config)
    mode = _settle_quantization(quantization, stored, sketch, layout, target, source)
    tokenizer = read_tokenizer(source)
    options = {"attn_implementation": attn_implementation, "experts_implementation": experts_implementation}
    given = {name: value for name, value in options.items() if value}
    auto_class = AutoModelForCausalLM if language_model else AutoModel
    model = read_weights(auto_class, find_source(path, weights=True), mode, stored is not None, dtype, target, **given)
    split = mode != "none" and quantize.is_ours(mode)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name=source.name,
        revision=source.revision,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=mode,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        experts_implementation=(
            "per_expert_linear" if split else getattr(model.config, "_experts_implementation", None)
        ),
        device=target,
        tokenizer_hash=_tokenizer_hash(tokenizer),
    )


def read_weights(
    auto_class: Any, source: Source, mode: str, stored: bool, dtype: str, device: torch.device, **options: Any
) -> PreTrainedModel:
    """Return the model that `auto_class` makes of `source`, quantised as `mode` says, or as it is `stored`.

    Raises ConfigurationError for files that can not be used, ExpertSpeculationError where quantising did not work.
    """
    ours = mode != "none" and quantize.is_ours(mode)
    if device.type != "cpu" or ours:
        options["device_map"] = {"": device}
    with (
        refusing(source, "weights"),
        quantize.quantized_loading(mode if ours else "none", stored=stored) as quantized_options,
    ):
        model, report = auto_class.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
            **quantized_options,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigurationError(
            f"{source.folder}: the checkpoint lacks {len(missing)} of the model's tensors, first {missing[0]!r}; "
            "copy or download the model again"
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    if ours:
        quantize.check_quantized(loaded, mode)
    return loaded


def load_tokenizer(path: str) -> Any:
    """Load only the tokenizer of the model `path`; raises ConfigurationError where there is none."""
    return read_tokenizer(find_source(path))


def _settle_quantization(
    asked: str,
    stored: str | None,
    sketch: PreTrainedModel,
    layout: RouterLayout,
    device: torch.device,
    source: Source,
) -> str:
    """Return the mode to load in; raises ConfigurationError where the model can not fit or not be quantised so."""
    if stored:
        if asked not in ("none", "auto", stored):
            raise ConfigurationError(
                f"{source.folder}: the checkpoint is already quantised, as {stored}; "
                "use --quantization none to run it as it is"
            )
        if not quantize.is_ours(stored):
            return stored
        asked = stored
    needed = {"none": count_by_component(sketch, layout)["total"][1], **quantized_bytes(sketch, layout)}
    free = free_memory_bytes(device)
    if asked == "auto":
        asked = most_precise(needed, free) if device.type == "cuda" else "none"
    if asked != "none":
        check_quantizable(sketch, layout, asked, device)
    size = needed.get(asked, 0)  # fp4 is only ever read
    if size > free:
        smaller = [mode for mode in needed if needed[mode] <= free]
        remedy = f"use --quantization {smaller[0]}, " if smaller and not stored else "use "
        raise ConfigurationError(
            f"{source.folder}: needs {size / 1e9:.1f} GB as {_spoken(asked, sketch)}, and {device} has "
            f"{free / 1e9:.1f} GB free; {remedy}a smaller model or a device with more memory"
        )
    return asked


def most_precise(needed: dict[str, int], free: int) -> str:
    """Return the first mode of mode -> bytes that fits into nine tenths of the free bytes; none where none does."""
    return next((mode for mode, size in needed.items() if size <= _SHARE_FOR_WEIGHTS * free), "none")


def _spoken(mode: str, sketch: PreTrainedModel) -> str:
    return str(sketch.dtype).removeprefix("torch.") if mode == "none" else mode


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a digest of all that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
