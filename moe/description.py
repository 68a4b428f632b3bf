"""What a model is, from its configuration alone: its routers, and its bytes by component and by quantisation.

The model is built on the meta device, where it takes no memory, and no weight is read.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from groundwork.errors import ConfigurationError
from moe import stored
from moe.quantizable import quantized_bytes
from moe.routers import RouterLayout, find_routers
from moe.source import Source, find_source, refusing

DTYPES = ("auto", "float32", "bfloat16", "float16")


def describe_model(path: str, dtype: str = "auto") -> dict[str, Any]:
    """Return what tracing the model would meet, from its configuration alone: no weight is read.

    Keys: name, revision, family, model_layers, num_layers (MoE layers), moe_layers, num_experts, top_k, router_class,
    weights_normalized, dtype, quantization (of the checkpoint), parameters and parameter_bytes (each by component and
    as `total`, without the language model's head), quantized_bytes (of the whole, by `--quantization`; empty where the
    experts can not be quantised; of a checkpoint that is quantised already only what it can be run as). `parameters`
    and `parameter_bytes` are those before quantising, which a checkpoint in MXFP4 or FP8 is restored to. Raises
    ConfigurationError as `load_model` does.
    """
    choose("--dtype", dtype, DTYPES)
    source = find_source(path)
    sketch, layout = sketch_model(source, dtype)
    kept = stored.stored_mode(sketch.config)
    stored.check_readable(kept, source.folder)
    counts = count_by_component(sketch, layout)
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
        "quantization": kept or "none",
        "parameters": {name: count for name, (count, _) in counts.items()},
        "parameter_bytes": {name: size for name, (_, size) in counts.items()},
        "quantized_bytes": stored.kept_bytes(sketch, layout, kept) if kept else quantized_bytes(sketch, layout),
    }


def sketch_model(source: Source, dtype: str, auto_class: Any = AutoModel) -> tuple[PreTrainedModel, RouterLayout]:
    """Return the model of `auto_class` on the meta device, which takes no memory, and its routers."""
    with refusing(source, "config.json"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        wanted = (stated or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        config.name_or_path = str(source.folder)
        return sketch_config(config, wanted, auto_class)


def sketch_config(config: Any, dtype: torch.dtype, auto_class: Any = AutoModel) -> tuple[PreTrainedModel, RouterLayout]:
    """Return the model of a configuration on the meta device and its routers; raises ConfigurationError as they do."""
    if type(config) not in auto_class._model_mapping:
        raise ConfigurationError(
            f"{config.model_type} can not be traced: transformers has no AutoModel for it; "
            "choose a model of another family"
        )
    with torch.device("meta"):
        sketch = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    return sketch, find_routers(sketch)


def count_by_component(model: PreTrainedModel, layout: RouterLayout) -> dict[str, tuple[int, int]]:
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


def choose(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigurationError for a value that is not among the known ones."""
    if value not in known:
        raise ConfigurationError(f"{option} {value}: unknown; use one of {', '.join(known)}")
