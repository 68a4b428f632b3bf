"""Loading a mixture-of-experts model for tracing: its base model, without the language-model head, and its tokenizer.

Everything that can be refused from the configuration is refused before any weight is read. Weights come from
safetensors only, and code from a model's repository is never run.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device, free_memory_bytes
from moe import quantize
from moe.routers import RouterLayout, find_routers
from moe.source import Source, find_source, read_tokenizer, refusing

DTYPES = ("auto", "float32", "bfloat16", "float16")
_auto_model: Any = AutoModel  # not annotated by transformers


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
) -> LoadedModel:
    """Load the MoE model in the local folder, or with the hub id, `path`, in evaluation mode and without gradients.

    `dtype="auto"` keeps the checkpoint's. Raises ConfigurationError, in one sentence with the remedy, for a folder that
    is missing or holds no such model, a dense model, unknown options, and a hub that can not be reached.
    """
    _choose("--dtype", dtype, DTYPES)
    _choose("--quantization", quantization, quantize.MODES)
    if attn_implementation:
        _choose("--attn_implementation", attn_implementation, ("eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())))
    if experts_implementation:
        known = ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys()))
        _choose("--experts_implementation", experts_implementation, known)
    target = choose_device(device)
    source = find_source(path)
    sketch, layout = _sketch(source, dtype)
    quantization = _settle_quantization(quantization, sketch, layout, target, source)
    tokenizer = read_tokenizer(source)
    source = find_source(path, weights=True)
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if experts_implementation:
        options["experts_implementation"] = experts_implementation
    if target.type != "cpu" or quantization != "none":
        options["device_map"] = {"": target}
    with refusing(source, "weights"), quantize.quantized_loading(quantization) as quantized_options:
        model, report = _auto_model.from_pretrained(
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
    model = model.eval().requires_grad_(False)
    if quantization != "none":
        quantize.check_quantized(model, quantization)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name=source.name,
        revision=source.revision,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=_quantization_label(model, quantization),
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        experts_implementation=(
            getattr(model.config, "_experts_implementation", None) if quantization == "none" else "per_expert_linear"
        ),
        device=target,
        tokenizer_hash=_tokenizer_hash(tokenizer),
    )


def load_tokenizer(path: str) -> Any:
    """Load only the tokenizer of the model `path`; raises ConfigurationError where there is none."""
    return read_tokenizer(find_source(path))


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a digest of all that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
