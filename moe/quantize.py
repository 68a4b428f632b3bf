"""Quantising a mixture-of-experts model with bitsandbytes so that its experts, nearly all of its bytes, really shrink.

transformers 5 keeps the experts of a layer fused in 3-D parameters, and bitsandbytes replaces `nn.Linear` only: left to
themselves they load a "4-bit" model whose experts are all bfloat16. Here the fused experts are replaced, on the meta
device and before any weight is read, by one set of `nn.Linear` per expert under the checkpoint's own names, and the
converters that would merge the experts are dropped; then the stock quantisers do the rest. Routers stay as they are.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.moe import _default_apply_gate
from transformers.quantizers import auto
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.routers import find_routers

_config_of: Any = BitsAndBytesConfig  # not annotated by transformers

MODES = ("none", "int8", "nf4", "nf4-double", "auto")
# int8 adds one float32 scale to each row of a weight, which weighs most in the narrow rows of small models.
_MAX_BYTES_PER_PARAMETER = {"int8": 1.25, "nf4": 1.0, "nf4-double": 1.0}


class PerExpertLinears(nn.Module):
    """The experts of one layer as children `0` ... `E-1`, gated feed-forward modules, called as fused experts are."""

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        num_experts, double_width, hidden = fused.gate_up_proj.shape
        gate, up, down = names
        self.act_fn = fused.act_fn
        self.names = names
        for index in range(num_experts):
            expert = nn.Module()
            expert.add_module(gate, nn.Linear(hidden, double_width // 2, bias=False))
            expert.add_module(up, nn.Linear(hidden, double_width // 2, bias=False))
            expert.add_module(down, nn.Linear(double_width // 2, hidden, bias=False))
            self.add_module(str(index), expert)

    def forward(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the routed experts' outputs, [N, D]."""
        total_ND = torch.zeros_like(hidden_ND)
        for index in torch.unique(ids_NK).tolist():
            token, rank = torch.where(ids_NK == index)
            gate, up, down = [self.get_submodule(f"{index}.{name}") for name in self.names]
            rows = hidden_ND[token]
            output = down(self.act_fn(gate(rows)) * up(rows)) * weights_NK[token, rank, None]
            total_ND.index_add_(0, token, output.to(total_ND.dtype))
        return total_ND


@contextmanager
def quantized_loading(mode: str) -> Iterator[dict[str, Any]]:
    """Yield the options with which `from_pretrained`, inside this context, loads a model quantised as `mode` says.

    Raises ConfigurationError for a family whose experts can not be split into linear modules.
    """
    if mode == "none":
        yield {}
        return
    # It would say at every call that int8 works on float16 inputs, and on a CPU that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    stock = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in ("bitsandbytes_4bit", "bitsandbytes_8bit")}
    auto.AUTO_QUANTIZER_MAPPING.update(bitsandbytes_4bit=_ExpertQuantizer4Bit, bitsandbytes_8bit=_ExpertQuantizer8Bit)
    try:
        if mode == "int8":
            settings: dict[str, Any] = {"load_in_8bit": True}
        else:
            double = mode == "nf4-double"
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
        yield {"quantization_config": _config_of(**settings)}
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(stock)


def expert_bytes_per_parameter(model: nn.Module) -> float:
    """Return the bytes that one expert parameter takes, its share of the quantisation statistics included."""
    bytes_taken, parameters = 0, 0
    for experts in (module for module in model.modules() if isinstance(module, PerExpertLinears)):
        for linear in (module for module in experts.modules() if isinstance(module, nn.Linear)):
            parameters += linear.in_features * linear.out_features
            bytes_taken += linear.weight.nbytes + sum(each.nbytes for each in _statistics(linear))
    if not parameters:
        raise ExpertSpeculationError("quantisation did not reach the experts: they are still fused, in full precision")
    return bytes_taken / parameters


def check_quantized(model: PreTrainedModel, mode: str) -> None:
    """Raise ExpertSpeculationError unless the experts of `model` are as small as `mode` promises and routers intact."""
    found, limit = expert_bytes_per_parameter(model), _MAX_BYTES_PER_PARAMETER[mode]
    if found >= limit:
        raise ExpertSpeculationError(
            f"--quantization {mode}: experts take {found:.2f} bytes per parameter where less than {limit} was wanted; "
            "the installed bitsandbytes did not quantise them"
        )
    for site in find_routers(model).sites:
        if not all(parameter.is_floating_point() for parameter in site.module.parameters()):
            raise ExpertSpeculationError(f"--quantization {mode}: router {site.name!r} was quantised too")


def _statistics(linear: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the scales that bitsandbytes keeps beside a weight."""
    state = getattr(linear.weight, "quant_state", None)
    for holder in (state, getattr(state, "state2", None)):
        if holder is not None:
            yield holder.absmax
    # An int8 layer moves its row scales from the weight to its own state on the first call.
    scales = [getattr(holder, "SCB", None) for holder in (linear.weight, getattr(linear, "state", None))]
    yield from [scale for scale in scales if scale is not None][:1]


class _SplitExperts:
    """What both quantisers do differently from the stock ones; mixed in before them."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        layout = find_routers(model)
        gate_up, down = _expert_converters(get_model_conversion_mapping(model))
        names = (*_linear_names(gate_up), *_linear_names(down))
        for site in layout.sites:
            if len(names) != 3 or not _is_plain(site.experts):
                raise ConfigurationError(
                    f"--quantization: the experts of {type(model).__name__} can not be split into linear modules; "
                    "use --quantization none"
                )
            with torch.device("meta"):
                site.block.experts = PerExpertLinears(site.experts, names)
        routers = [site.name for site in layout.sites]
        gates = [name for name, module in model.named_modules() if getattr(module, "out_features", None) == 1]
        self.quantization_config.llm_int8_skip_modules = [*get_keys_to_not_convert(model), *routers, *gates]
        return super()._process_model_before_weight_loading(model, *args, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Drop the converters that merge the experts' weights into the parameters that are no longer there."""
        merging = _expert_converters(weight_conversions)
        kept = [each for each in weight_conversions if each not in merging]
        return super().update_weight_conversions(kept, model)  # type: ignore[misc, no-any-return]


class _ExpertQuantizer4Bit(_SplitExperts, Bnb4BitHfQuantizer):
    pass


class _ExpertQuantizer8Bit(_SplitExperts, Bnb8BitHfQuantizer):
    pass


def _expert_converters(conversions: list[Any]) -> tuple[Any, Any]:
    """Return the converters that fill `experts.gate_up_proj` and `experts.down_proj`; None where there is none."""

    def filling(target: str) -> Any:
        fitting = [
            each
            for each in conversions
            if isinstance(each, WeightConverter) and each._original_target_patterns[0].endswith(target)
        ]
        return fitting[0] if fitting else None

    return filling("experts.gate_up_proj"), filling("experts.down_proj")


def _linear_names(converter: Any) -> list[str]:
    """`.experts.*.w1.weight` -> `w1`."""
    return [pattern.split(".")[-2] for pattern in converter._original_source_patterns] if converter else []


def _is_plain(experts: nn.Module) -> bool:
    """Whether the experts compute down(act(gate(x)) * up(x)) without biases."""
    return (
        getattr(type(experts), "_apply_gate", None) is _default_apply_gate
        and bool(getattr(experts, "has_gate", False))
        and bool(getattr(experts, "is_concatenated", False))
        and not any(getattr(experts, flag, False) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    )
