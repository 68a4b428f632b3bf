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
from moe import quantize, stored
from moe.description import DTYPES, choose, count_by_component, describe_model, sketch_model
from moe.quantizable import check_quantizable, quantized_bytes, two_layers_bytes
from moe.routers import RouterLayout
from moe.source import Source, find_source, quiet, read_tokenizer, refusing, require_safetensors

SHARE_FOR_WEIGHTS = 0.9  # of the free memory; the rest is for activations

__all__ = ["DTYPES", "LoadedModel", "describe_model", "foresee_loading", "load_model", "load_tokenizer", "read_weights"]


@dataclass(frozen=True)
class Loading:
    """How a model will be loaded, as its configuration and the memory that is free now decide it.

    `stored` is how the checkpoint is quantised, None where it is not; `needed` and `free` are bytes.
    """

    source: Source
    device: torch.device
    mode: str
    stored: str | None
    needed: int
    free: int


class TooLargeError(ConfigurationError):
    """The model does not fit in the device's free memory; `loading` is how it would have been loaded."""

    def __init__(self, message: str, loading: Loading) -> None:
        super().__init__(message)
        self.loading = loading


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
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "experts_implementation": experts_implementation,
    }
    loading = foresee_loading(path, device=device, dtype=dtype, quantization=quantization, **options)
    source, mode, target = loading.source, loading.mode, loading.device
    tokenizer = read_tokenizer(source)
    given = {name: value for name, value in options.items() if value}
    auto_class = AutoModelForCausalLM if language_model else AutoModel
    whole = find_source(path, weights=True)
    model = read_weights(auto_class, whole, mode, loading.stored is not None, dtype, target, **given)
    return describe_loaded(model, tokenizer, loading)


def describe_loaded(model: PreTrainedModel, tokenizer: Any, loading: Loading) -> LoadedModel:
    """Return the model that was loaded as foreseen with what a trace must say of it."""
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name=loading.source.name,
        revision=loading.source.revision,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=loading.mode,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        experts_implementation=_experts_implementation(model, loading.mode),
        device=loading.device,
        tokenizer_hash=_tokenizer_hash(tokenizer),
    )


def foresee_loading(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    streamed: bool = False,
) -> Loading:
    """Return how `load_model` would load, and refuse what it would refuse before it reads weights.

    A `streamed` model is held a layer or two at a time, and what is quantised as no option asks for is restored.
    """
    choose("--dtype", dtype, DTYPES)
    choose("--quantization", quantization, quantize.MODES)
    if attn_implementation:
        known = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith("paged|")]  # of serving
        choose("--attn_implementation", attn_implementation, ("eager", *sorted(known)))
    if experts_implementation:
        known = ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]
        choose("--experts_implementation", experts_implementation, tuple(known))
    target = choose_device(device)
    source = find_source(path)
    sketch, layout = sketch_model(source, dtype)
    if attn_implementation:
        _check_attention(sketch, attn_implementation)
    loading = _settle_quantization(quantization, sketch, layout, target, source, streamed)
    if source.revision is None:
        require_safetensors(source)
    return loading


def read_weights(
    auto_class: Any, source: Source, mode: str, is_stored: bool, dtype: str, device: torch.device, **options: Any
) -> PreTrainedModel:
    """Return the model that `auto_class` makes of `source`, quantised as `mode` says; `is_stored`: it is so already.

    Raises ConfigurationError for files that can not be used, ExpertSpeculationError where quantising did not work.
    """
    model, report = call_loader(auto_class, source, mode, is_stored, dtype, device, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigurationError(
            f"{source.folder}: the checkpoint lacks {len(missing)} of the model's tensors, first {missing[0]!r}; "
            "copy or download the model again"
        )
    if quantize.is_ours(mode):
        quantize.check_quantized(model, mode)
    elif is_stored:
        stored.settle_loaded(model, mode, report["unexpected_keys"])
    return model


def call_loader(
    auto_class: Any, source: Source, mode: str, is_stored: bool, dtype: str, device: torch.device, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return what transformers' `from_pretrained` makes of `source`, unchecked, and what it reports."""
    require_safetensors(source)
    ours = quantize.is_ours(mode)
    if device.type != "cpu" or ours:
        options["device_map"] = {"": device}
    loading = quantize.quantized_loading(mode, stored=is_stored) if ours else stored.stored_loading(mode)
    with refusing(source, "weights"), loading as quantized_options:
        model, report = auto_class.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
            **quantized_options,
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded, report


def load_tokenizer(path: str) -> Any:
    """Load only the tokenizer of the model `path`; raises ConfigurationError where there is none."""
    return read_tokenizer(find_source(path))


def _check_attention(sketch: PreTrainedModel, name: str) -> None:
    """Raise ConfigurationError where the model has no such attention, or the package that computes it is missing."""
    try:
        with quiet():
            sketch.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigurationError(
            f"--attn_implementation {name}: can not be used here ({reason}); use sdpa or eager, or install that"
        ) from error


def _settle_quantization(
    asked: str, sketch: PreTrainedModel, layout: RouterLayout, device: torch.device, source: Source, streamed: bool
) -> Loading:
    """Return the mode to load in; raises ConfigurationError where the model can not fit or not be quantised so."""
    kept = stored.stored_mode(sketch.config)
    stored.check_readable(kept, source.folder)
    if kept:
        if asked not in ("none", "auto", kept):
            raise ConfigurationError(
                f"{source.folder}: the checkpoint is already quantised, as {kept}; "
                "leave --quantization out to run it as it is"
            )
        asked = stored.loaded_mode(kept, torch.device("cpu") if streamed else device)
    needed = {"none": count_by_component(sketch, layout)["total"][1], **quantized_bytes(sketch, layout)}
    free = free_memory_bytes(device)
    if streamed:
        asked = "none" if asked == "auto" else asked
        return _settle_streamed(asked, kept, sketch, layout, device, source)
    if asked == "auto":
        asked = most_precise(needed, free) if device.type == "cuda" else "none"
    if quantize.is_ours(asked):
        check_quantizable(sketch, layout, asked, device)
        size = needed.get(asked, 0)  # fp4 is only ever read
    else:
        size = stored.loaded_bytes(sketch, layout, asked)
    if size > free:
        smaller = [mode for mode in needed if needed[mode] <= free and mode != asked]
        least = min(needed, key=lambda mode: needed[mode])
        of_original = f" on the model's original checkpoint, which is not {kept}" if kept else ""
        remedy = "use "
        if smaller:
            remedy = f"use --quantization {smaller[0]}{of_original}, "
        elif needed[least] < size:
            remedy = f"even --quantization {least} needs {needed[least] / 1e9:.1f} GB{of_original}; use "
        raise TooLargeError(
            f"{source.folder}: needs {size / 1e9:.1f} GB as {_spoken(asked, sketch)}, and {device} has "
            f"{free / 1e9:.1f} GB free; {remedy}a smaller model or a device with more memory",
            Loading(source, device, asked, kept, size, free),
        )
    return Loading(source, device, asked, kept, size, free)


def _settle_streamed(
    mode: str, kept: str | None, sketch: PreTrainedModel, layout: RouterLayout, device: torch.device, source: Source
) -> Loading:
    """Return how the model is loaded layer by layer; raises ConfigurationError where not even two layers fit."""
    if quantize.is_ours(mode):
        check_quantizable(sketch, layout, mode, device)
    free, needed = free_memory_bytes(device), two_layers_bytes(sketch, layout, mode)
    if needed > free:
        raise TooLargeError(
            f"{source.folder}: --execution streamed needs {needed / 1e9:.1f} GB, two layers and what lies outside of "
            f"layers as {_spoken(mode, sketch)}, and {device} has {free / 1e9:.1f} GB free; free memory, quantise, or "
            "use a smaller model",
            Loading(source, device, mode, kept, needed, free),
        )
    return Loading(source, device, mode, kept, needed, free)


def most_precise(needed: dict[str, int], free: int) -> str:
    """Return the first mode of mode -> bytes that fits into nine tenths of the free bytes; none where none does."""
    return next((mode for mode, size in needed.items() if size <= SHARE_FOR_WEIGHTS * free), "none")


def _spoken(mode: str, sketch: PreTrainedModel) -> str:
    dtype = str(sketch.dtype).removeprefix("torch.")
    return mode if quantize.is_ours(mode) or mode == "mxfp4" else dtype


def _experts_implementation(model: PreTrainedModel, mode: str) -> str | None:
    if quantize.is_ours(mode):
        return "per_expert_linear"
    return "mxfp4_kernels" if mode == "mxfp4" else getattr(model.config, "_experts_implementation", None)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a digest of all that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
