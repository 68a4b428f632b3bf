"""Loading a mixture-of-experts model for tracing: its base model, without the language-model head, and its tokenizer.

Everything that can be refused from the configuration is refused before any weight is read. Weights come from
safetensors only, and code from a model's repository is never run.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from groundwork.errors import ConfigurationError
from moe import quantize, stored
from moe.checksums import check_folder
from moe.description import sketch_model
from moe.foresight import Loading, foresee_loading
from moe.source import Source, find_source, read_tokenizer, refusing, require_safetensors
from moe.spreading import DeviceMap, with_head

Placed = torch.device | DeviceMap


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
    devices: tuple[torch.device, ...]
    tokenizer_hash: str

    @property
    def device(self) -> torch.device:
        """Return the device that inputs go to."""
        return self.devices[0]


def load_model(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    language_model: bool = False,
) -> LoadedModel:
    """Load the MoE model in the local folder, or with the hub id, `path`, in evaluation mode and without gradients.

    `dtype="auto"` keeps the checkpoint's; without `quantization` weights stay as they are stored, and "auto" takes, on
    a GPU, the most precise mode that fits. A checkpoint that is quantised already stays so, and is refused where
    another mode is asked for, "none" among them. The files of a packed model are compared with their checksums. GPUs
    joined by plus signs, as in `cuda:0+cuda:1`, hold the model together, each some of its layers. A `language_model`
    comes with its head, to generate text. Raises ConfigurationError, in one sentence with the remedy, for a folder that
    is missing or holds no such model, a dense model, unknown options, a hub that can not be reached, and a changed file
    of a packed model.
    """
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "experts_implementation": experts_implementation,
    }
    loading = foresee_loading(path, device=device, dtype=dtype, quantization=quantization, **options)
    source, mode = loading.source, loading.mode
    tokenizer = read_tokenizer(source)
    given = {name: value for name, value in options.items() if value}
    auto_class = AutoModelForCausalLM if language_model else AutoModel
    whole = find_source(path, weights=True)
    placed: Placed = loading.placed or loading.device
    if loading.placed and language_model:
        placed = with_head(sketch_model(source, dtype, auto_class)[0], loading.placed)
    model = read_weights(auto_class, whole, mode, loading.stored is not None, dtype, placed, **given)
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
        devices=loading.devices,
        tokenizer_hash=_tokenizer_hash(tokenizer),
    )


def read_weights(
    auto_class: Any, source: Source, mode: str, is_stored: bool, dtype: str, placed: Placed, **options: Any
) -> PreTrainedModel:
    """Return the model that `auto_class` makes of `source`, quantised as `mode` says; `is_stored`: it is so already.

    `placed` is its device, or the devices of its parts. Raises ConfigurationError for files that can not be used, or of
    a packed model that have changed, ExpertSpeculationError where quantising did not work.
    """
    check_folder(source.folder)
    model, report = call_loader(auto_class, source, mode, is_stored, dtype, placed, **options)
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
    auto_class: Any, source: Source, mode: str, is_stored: bool, dtype: str, placed: Placed, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return what transformers' `from_pretrained` makes of `source`, unchecked, and what it reports."""
    require_safetensors(source)
    ours = quantize.is_ours(mode)
    if isinstance(placed, dict):
        options["device_map"] = placed
    elif placed.type != "cpu" or ours:
        options["device_map"] = {"": placed}
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


def _experts_implementation(model: PreTrainedModel, mode: str) -> str | None:
    if quantize.is_ours(mode):
        return "per_expert_linear"
    return "mxfp4_kernels" if mode == "mxfp4" else getattr(model.config, "_experts_implementation", None)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a digest of all that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
