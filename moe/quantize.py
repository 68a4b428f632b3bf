"""Quantising a mixture-of-experts model with bitsandbytes so that its experts, nearly all of its bytes, really shrink.

transformers 5 keeps the experts of a layer fused in 3-D parameters, and bitsandbytes replaces `nn.Linear` only: left to
themselves they load a "4-bit" model whose experts are all bfloat16. Here the fused experts are replaced, on the meta
device and before any weight is read, by one set of `nn.Linear` per expert under the checkpoint's own names, and the
converters that would merge the experts are dropped; then the stock quantisers do the rest. Routers stay as they are.
"""

import ctypes
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from groundwork.errors import ExpertSpeculationError
from moe.quantizable import kept_modules
from moe.routers import find_routers
from moe.split_experts import PerExpertLinears, find_split
from moe.split_loading import splitting_conversions, without_splitting

_config_of: Any = BitsAndBytesConfig  # not annotated by transformers

MODES = ("none", "int8", "nf4", "nf4-double", "auto")
# int8 adds one float32 scale to each row of a weight, which weighs most in the narrow rows of small models.
_MAX_BYTES_INT8, _MAX_BYTES_4_BIT = 1.25, 1.0
_TENSORS_BETWEEN_TRIMS = 16


@contextmanager
def quantized_loading(mode: str, *, stored: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the options with which `from_pretrained`, inside this context, loads a model quantised as `mode` says.

    `stored`: the checkpoint is quantised already, and its own configuration says how. `check_quantizable` comes first.
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
    check_experts(model, mode)
    for site in find_routers(model).sites:
        if not all(parameter.is_floating_point() for parameter in site.module.parameters()):
            raise ExpertSpeculationError(f"--quantization {mode}: router {site.name!r} was quantised too")


def check_experts(module: nn.Module, mode: str) -> None:
    """Raise ExpertSpeculationError unless experts, and all else that is to be quantised in a module, are so."""
    found, limit = expert_bytes_per_parameter(module), _MAX_BYTES_INT8 if mode == "int8" else _MAX_BYTES_4_BIT
    if found >= limit:
        raise ExpertSpeculationError(
            f"--quantization {mode}: experts take {found:.2f} bytes per parameter where less than {limit} was wanted; "
            "quantise the original checkpoint anew, with the pinned bitsandbytes"
        )
    for name, part in module.named_modules():
        if isinstance(part, _quantized_linears()) and not any(True for _ in _statistics(part)):
            raise ExpertSpeculationError(
                f"--quantization {mode}: {name!r} is in full precision where the configuration says that it is "
                "quantised; quantise the original checkpoint anew"
            )


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
        split = find_split(model, layout)
        assert split is not None, "check_quantizable was not asked"
        # Stored names are those of transformers 4, with a head around the base model.
        stored = [
            re.sub(r"^model\.", "", name).replace("block_sparse_moe", "mlp")
            for name in self.quantization_config.llm_int8_skip_modules or []
        ]
        self.quantization_config.llm_int8_skip_modules = sorted({*stored, *kept_modules(model, layout)})
        for site in layout.sites:
            with torch.device("meta"):
                site.block.experts = PerExpertLinears(site.experts, split)
            block: Any = site.block
            block._is_hf_initialized = True  # some families would initialise the fused experts from their block
        return super()._process_model_before_weight_loading(model, *args, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Fill the experts' linear modules instead of the fused parameters that are no longer there."""
        experts = next(module for module in model.modules() if isinstance(module, PerExpertLinears))
        ours = splitting_conversions(weight_conversions, experts)
        return super().update_weight_conversions(ours, model)  # type: ignore[misc, no-any-return]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = without_splitting(model._weight_conversions)
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def get_quantize_ops(self) -> Any:
        """Quantise, and give the memory of the full-precision tensors back as loading goes on."""
        stock: Any = type(super().get_quantize_ops())  # type: ignore[misc]

        def convert(operation: Any, *args: Any, **kwargs: Any) -> Any:
            result = stock.convert(operation, *args, **kwargs)
            self._converted = getattr(self, "_converted", 0) + len(result)
            if self._converted >= _TENSORS_BETWEEN_TRIMS:
                self._converted = 0
                _trim_heap()
            return result

        return type(stock.__name__, (stock,), {"convert": convert})(self)

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
    state = QuantState.from_dict(stored, device=weight.device)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))  # one row, that no block can cross
    matrix: torch.Tensor = dequantize_4bit(weight, state)
    return matrix.reshape(shape)


def _trim_heap() -> None:
    """Give free pages back to the system: glibc keeps those between small live blocks, up to twice the checkpoint."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _quantized_linears() -> tuple[type[nn.Module], ...]:
    import bitsandbytes  # on import it speaks, unless `quantized_loading` told it not to

    layers: Any = bitsandbytes.nn
    return layers.Linear4bit, layers.Linear8bitLt
