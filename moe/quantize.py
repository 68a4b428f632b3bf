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
from transformers.quantizers import auto
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.routers import RouterLayout, find_routers
from moe.split_experts import PerExpertLinears, expert_projections, merging_converters

_config_of: Any = BitsAndBytesConfig  # not annotated by transformers

MODES = ("none", "int8", "nf4", "nf4-double", "auto")
# int8 adds one float32 scale to each row of a weight, which weighs most in the narrow rows of small models.
_MAX_BYTES_INT8, _MAX_BYTES_4_BIT = 1.25, 1.0


def quantized_bytes(model: PreTrainedModel, layout: RouterLayout) -> dict[str, int]:
    """Return mode -> bytes of `model`, whose weights may be on the meta device; empty where it can not be quantised."""
    if expert_projections(model, layout) is None:
        return {}
    skipped = _kept_modules(model, layout)
    shapes: dict[int, list[torch.Size]] = {}
    for site in layout.sites:
        fused: Any = site.experts
        for parameter in (fused.gate_up_proj, fused.down_proj):
            halves = 2 if parameter is fused.gate_up_proj else 1
            num_experts, rows, columns = parameter.shape
            shapes[id(parameter)] = [torch.Size((rows // halves, columns))] * (num_experts * halves)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and should_convert_module(name, skipped):
            shapes[id(module.weight)] = [module.weight.shape]
    whole = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in shapes)
    matrices = [shape for each in shapes.values() for shape in each]
    return {mode: whole + sum(size(*shape) for shape in matrices) for mode, size in _MATRIX_BYTES.items()}


@contextmanager
def quantized_loading(mode: str, *, stored: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the options with which `from_pretrained`, inside this context, loads a model quantised as `mode` says.

    `stored`: the checkpoint is quantised already, and its own configuration says how. Raises ConfigurationError for a
    family whose experts can not be split into linear modules.
    """
    if mode == "none":
        yield {}
        return
    # It would say at every call that int8 works on float16 inputs, and on a CPU that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    stock = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in ("bitsandbytes_4bit", "bitsandbytes_8bit")}
    auto.AUTO_QUANTIZER_MAPPING.update(bitsandbytes_4bit=_ExpertQuantizer4Bit, bitsandbytes_8bit=_ExpertQuantizer8Bit)
    try:
        if stored:
            settings: dict[str, Any] = {}
        elif mode == "int8":
            settings = {"load_in_8bit": True}
        else:
            double = mode == "nf4-double"
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
        yield {"quantization_config": _config_of(**settings)} if settings else {}
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(stock)


def stored_mode(config: Any) -> str | None:
    """Return how the checkpoint of `config` is quantised; None where it is not.

    By bitsandbytes: int8, nf4, nf4-double (or fp4, fp4-double, which no option asks for); else the method's name.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        double = "-double" if settings.get("bnb_4bit_use_double_quant") else ""
        return str(settings.get("bnb_4bit_quant_type", "fp4")) + double
    return str(settings.get("quant_method", "unknown"))


def is_ours(mode: str) -> bool:
    """Say whether checkpoints stored in this mode are read here, and not by transformers' own quantisers."""
    return mode == "int8" or mode.startswith(("nf4", "fp4"))


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
    found, limit = expert_bytes_per_parameter(model), _MAX_BYTES_INT8 if mode == "int8" else _MAX_BYTES_4_BIT
    if found >= limit:
        raise ExpertSpeculationError(
            f"--quantization {mode}: experts take {found:.2f} bytes per parameter where less than {limit} was wanted; "
            "quantise the original checkpoint anew, with the pinned bitsandbytes"
        )
    for name, module in model.named_modules():
        weight: Any = module.weight if isinstance(module, _quantized_linears()) else None
        if weight is not None and weight.is_floating_point():
            raise ExpertSpeculationError(
                f"--quantization {mode}: {name!r} is in full precision where the configuration says that it is "
                "quantised; quantise the original checkpoint anew"
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
        names = expert_projections(model, layout)
        if names is None:
            raise ConfigurationError(
                f"--quantization: the experts of {type(model).__name__} can not be split into linear modules; "
                "use --quantization none"
            )
        stored = self.quantization_config.llm_int8_skip_modules or []
        self.quantization_config.llm_int8_skip_modules = sorted({*stored, *_kept_modules(model, layout)})
        for site in layout.sites:
            with torch.device("meta"):
                site.block.experts = PerExpertLinears(site.experts, names)
        return super()._process_model_before_weight_loading(model, *args, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Drop the converters that merge the experts' weights into the parameters that are no longer there."""
        merging = merging_converters(weight_conversions)
        kept = [each for each in weight_conversions if each not in merging]
        return super().update_weight_conversions(kept, model)  # type: ignore[misc, no-any-return]

    def get_load_operations(self) -> dict[str, type]:
        """Read what is stored quantised; transformers 4 quantised routers too, which ours keep in full precision."""
        stock: Any = super().get_load_operations()["deserialize"]  # type: ignore[misc]

        def convert(operation: Any, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> Any:
            module = model.get_submodule(str(kwargs["full_layer_name"]).rpartition(".")[0])
            if len(input_dict) == 1 or isinstance(module, _quantized_linears()):
                return stock.convert(operation, input_dict, model=model, **kwargs)
            tensors = {name: each[0] if isinstance(each, list) else each for name, each in input_dict.items()}
            return {"weight": _dequantize(tensors).to(module.weight.dtype)}

        return {"deserialize": type(stock.__name__, (stock,), {"convert": convert})}


class _ExpertQuantizer4Bit(_SplitExperts, Bnb4BitHfQuantizer):
    pass


class _ExpertQuantizer8Bit(_SplitExperts, Bnb8BitHfQuantizer):
    pass


def _dequantize(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the matrix that a checkpoint stores as `weight` with its statistics."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weight = stored.pop("weight")
    if "SCB" in stored:  # row scales: the largest magnitude in a row is 127
        return weight.float() * (stored["SCB"].float() / 127)[:, None]
    matrix: torch.Tensor = dequantize_4bit(weight, QuantState.from_dict(stored, device=weight.device))
    return matrix


def _quantized_linears() -> tuple[type[nn.Module], ...]:
    import bitsandbytes  # on import it speaks, unless `quantized_loading` told it not to

    layers: Any = bitsandbytes.nn
    return layers.Linear4bit, layers.Linear8bitLt


def _kept_modules(model: PreTrainedModel, layout: RouterLayout) -> list[str]:
    """Name the modules that stay as they are: routers, gates of shared experts, heads and tied weights."""
    routers = [site.name for site in layout.sites]
    gates = [name for name, module in model.named_modules() if getattr(module, "out_features", None) == 1]
    return [*get_keys_to_not_convert(model), *routers, *gates]


def _nf4_bytes(rows: int, columns: int) -> int:
    """Half a byte a parameter and a float32 scale for each block of 64."""
    return -(-rows * columns // 2) + 4 * -(-rows * columns // 64)


def _nf4_double_bytes(rows: int, columns: int) -> int:
    """As NF4, with one byte a scale and a float32 for each 256 of them."""
    blocks = -(-rows * columns // 64)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256)


_MATRIX_BYTES = {
    "int8": lambda rows, columns: rows * columns + 4 * rows,  # one float32 scale a row
    "nf4": _nf4_bytes,
    "nf4-double": _nf4_double_bytes,
}
