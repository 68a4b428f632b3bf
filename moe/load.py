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


def describe_model(path: str, dtype: str = "auto") -> dict[str, Any]:
    """Return what tracing the model would meet, from its configuration alone: no weight is read.

    Keys: name, revision, family, model_layers, num_layers (MoE layers), moe_layers, num_experts, top_k, router_class,
    weights_normalized, dtype, parameters and parameter_bytes (each by component and as `total`, without the language
    model's head). Raises ConfigurationError as `load_model` does.
    """
    _choose("--dtype", dtype, DTYPES)
    source = find_source(path)
    sketch, layout = _sketch(source, dtype)
    counts = _count_by_component(sketch, layout)
    return {
        "name": source.name,
        "revision": source.revision,
        "family": type(sketch).__name__,
        "model_layers": sketch.config.get_text_config().num_hidden_layers,
        "num_layers": layout.num_layers,
        "moe_layers": list(layout.moe_layers),
        "num_experts": layout.num_experts,
        "top_k": layout.top_k,
        "router_class": layout.router_class,
        "weights_normalized": layout.weights_normalized,
        "dtype": str(sketch.dtype).removeprefix("torch."),
        "parameters": {name: count for name, (count, _) in counts.items()},
        "parameter_bytes": {name: size for name, (_, size) in counts.items()},
    }


def _sketch(source: Source, dtype: str) -> tuple[PreTrainedModel, RouterLayout]:
    """Return the model on the meta device, which takes no memory, and its routers."""
    with refusing(source, "config.json"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        wanted = (stated or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            sketch = _auto_model.from_config(config, dtype=wanted, trust_remote_code=False)
    sketch.config.name_or_path = str(source.folder)
    return sketch, find_routers(sketch)


def _settle_quantization(
    asked: str, sketch: PreTrainedModel, layout: RouterLayout, device: torch.device, source: Source
) -> str:
    """Return none, int8, nf4 or nf4-double, or raise ConfigurationError where the model can not fit or be quantised."""
    stored = getattr(sketch.config, "quantization_config", None)
    if stored and asked not in ("none", "auto"):
        raise ConfigurationError(
            f"{source.folder}: the checkpoint is already quantised; use --quantization none to run it as it is"
        )
    _, needed = _count_by_component(sketch, layout)["total"]
    free = free_memory_bytes(device)
    if asked == "auto":
        asked = "nf4" if device.type == "cuda" and needed > 0.9 * free and not stored else "none"
    if asked == "none" and needed > free and not stored:
        raise ConfigurationError(
            f"{source.folder}: needs {needed / 1e9:.1f} GB as {str(sketch.dtype).removeprefix('torch.')}, and {device} "
            f"has {free / 1e9:.1f} GB free; use --quantization nf4, a smaller model or a device with more memory"
        )
    return asked


def _quantization_label(model: PreTrainedModel, quantization: str) -> str:
    stored = getattr(model.config, "quantization_config", None)
    if quantization != "none" or stored is None:
        return quantization
    return str(stored["quant_method"] if isinstance(stored, dict) else stored.quant_method)


def _count_by_component(model: PreTrainedModel, layout: RouterLayout) -> dict[str, tuple[int, int]]:
    """Return (parameters, bytes) of each component, tied parameters once, and of their `total`."""
    component_of: dict[int, str] = {}

    def assign(module: nn.Module, component: str) -> None:
        for parameter in module.parameters():
            component_of.setdefault(id(parameter), component)

    for site in layout.sites:
        assign(site.module, "routers")
        assign(site.experts, "experts")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            assign(module, "embeddings")
        elif re.search(r"(?:^|\.)[^.]*shared[^.]*$", name):
            assign(module, "shared_experts")
        elif re.search(r"(?:^|\.)[^.]*attn[^.]*$|attention$", name):
            assign(module, "attention")
    counts: dict[str, tuple[int, int]] = {}
    for parameter in model.parameters():
        component = component_of.get(id(parameter), "other")
        count, size = counts.get(component, (0, 0))
        counts[component] = (count + parameter.numel(), size + parameter.nbytes)
    totals = (sum(count for count, _ in counts.values()), sum(size for _, size in counts.values()))
    return {**dict(sorted(counts.items())), "total": totals}


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a digest of all that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _choose(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"{option} {value}: unknown; use one of {', '.join(known)}")
