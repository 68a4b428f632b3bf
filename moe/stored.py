"""Checkpoints that their publishers quantised: run as they are, restored while they load, or refused.

transformers reads many such formats, each through a library of its own and most of them for linear modules only, which
the experts of these models are not. Read here are bitsandbytes' (by `quantize`), gpt-oss's MXFP4, and FP8 with a scale
a block (DeepSeek-V3, Qwen3-FP8); the last two are restored to the model's own dtype, MXFP4 where no kernels run it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.quantizers import auto
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.import_utils import is_kernels_available, is_triton_available
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.quantizable import quantized_bytes
from moe.quantize import is_ours
from moe.routers import RouterLayout, find_routers

_fp8_config: Any = FineGrainedFP8Config  # not annotated by transformers
_mxfp4_config: Any = Mxfp4Config
_has_triton: Any = is_triton_available
_RESTORED = "-dequantized"
_MXFP4_BITS = 4.25  # 4 a parameter and 8 for the scale of each 32: OCP Microscaling Formats 1.0, section 5.2
_MXFP4_CAPABILITY = (7, 5)  # of the GPU, and the release of triton: what transformers asks for
_MXFP4_TRITON = "3.4.0"


def stored_mode(config: Any) -> str | None:
    """Return how the checkpoint of `config` is quantised; None where it is not.

    By bitsandbytes: int8, nf4, nf4-double (or fp4, fp4-double, which no option asks for); else the method's name.
    """
    stored: Any = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        double = "-double" if settings.get("bnb_4bit_use_double_quant") else ""
        return str(settings.get("bnb_4bit_quant_type", "fp4")) + double
    return str(settings.get("quant_method", "unknown"))


def check_readable(stored: str | None, folder: Path) -> None:
    """Raise ConfigurationError for a checkpoint in a quantised format that is not read here."""
    if stored is None or is_ours(stored) or stored in ("mxfp4", "fp8"):
        return
    raise ConfigurationError(
        f"{folder}: its weights are quantised by {stored}, which is not read here (bitsandbytes, mxfp4 and fp8 are); "
        "use the model's original checkpoint, with --quantization int8 or nf4 if it must be smaller"
    )


def loaded_mode(stored: str, device: torch.device) -> str:
    """Return what a checkpoint stored so becomes on `device`: what a trace records as its quantisation.

    MXFP4 stays where transformers has kernels for it: with triton and `kernels`, on a GPU of capability 7.5 or more.
    """
    if is_ours(stored):
        return stored
    has_kernels = (
        stored == "mxfp4"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _MXFP4_CAPABILITY
        and is_kernels_available()
        and _has_triton(_MXFP4_TRITON)
    )
    return stored if has_kernels else stored + _RESTORED


def loaded_bytes(model: PreTrainedModel, layout: RouterLayout, mode: str) -> int:
    """Return the bytes of a model in the mode that `loaded_mode` gave, other than bitsandbytes'."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    if mode != "mxfp4":
        return whole
    matrices = [each for site in layout.sites for each in site.experts.parameters() if each.dim() == 3]
    return whole - sum(each.nbytes for each in matrices) + int(sum(each.numel() for each in matrices) * _MXFP4_BITS / 8)


def kept_bytes(model: PreTrainedModel, layout: RouterLayout, stored: str) -> dict[str, int]:
    """Return mode -> bytes of what a checkpoint stored so is where it needs not be restored."""
    if is_ours(stored):
        return {mode: size for mode, size in quantized_bytes(model, layout).items() if mode == stored}
    return {stored: loaded_bytes(model, layout, stored)} if stored == "mxfp4" else {}


@contextmanager
def stored_loading(mode: str) -> Iterator[dict[str, Any]]:
    """Yield the options with which `from_pretrained`, inside this context, loads a checkpoint as `loaded_mode` says."""
    stock = auto.AUTO_QUANTIZER_MAPPING["fp8"]
    auto.AUTO_QUANTIZER_MAPPING["fp8"] = _Fp8Quantizer
    try:
        if mode.startswith("mxfp4"):
            yield {"quantization_config": _mxfp4_config(dequantize=mode.endswith(_RESTORED))}
        elif mode.startswith("fp8"):
            yield {"quantization_config": _fp8_config(dequantize=True)}
        else:
            yield {}
    finally:
        auto.AUTO_QUANTIZER_MAPPING["fp8"] = stock


def settle_loaded(model: PreTrainedModel, mode: str, unexpected: set[str]) -> None:
    """Make the model call its routers, and raise ExpertSpeculationError unless it is what `mode` says.

    transformers' MXFP4 block passes by its router, and any hook on it, unless its experts are marked as hooked: then
    the router is called, and the experts with what it returns. `unexpected`: tensors of the checkpoint not used.
    """
    kept = [module for module in model.modules() if isinstance(module, Mxfp4GptOssExperts)]
    if len(kept) != (len(find_routers(model).sites) if mode == "mxfp4" else 0):
        raise ExpertSpeculationError(
            f"{type(model).__name__}: {len(kept)} layers stayed in MXFP4 where {mode} was to be loaded; "
            "update transformers, triton and kernels, or uninstall kernels to run the model restored"
        )
    for experts in kept:
        experts._is_hooked = True  # type: ignore[assignment]
    unscaled = sorted(name for name in unexpected if _weight_of(name) not in unexpected | {None})
    if unscaled:
        raise ConfigurationError(
            f"{type(model).__name__}: transformers leaves {len(unscaled)} scales of quantised weights unused, first "
            f"{unscaled[0]!r}; use the model's original checkpoint"
        )


def _weight_of(scale: str) -> str | None:
    """Return the name of the weights that a tensor of the checkpoint scales; None if it is none that does so."""
    found = re.fullmatch(r"(.*?)(_scale_inv|_scales?|\.scale)", scale)
    if found is None or scale.endswith(("input_scale", "activation_scale", "q_scale", "k_scale", "v_scale")):
        return None
    return f"{found[1]}.weight" if found[2] == ".scale" else found[1]


class _BlockwiseDequantize(Fp8Dequantize):
    """Restores matrices whose last blocks are cut off, too: the stock one spreads the scales evenly instead."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if scales.numel() == 1 or block is None or quantized.dtype == torch.int8:  # one scale; or packed FP4
            return super()._dequantize_one(quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        expected = -(-rows // block[0]), -(-columns // block[1])
        if tuple(scales.shape[-2:]) != expected:
            raise ValueError(f"{tuple(scales.shape)} scales for {rows} x {columns} weights in blocks of {block}")
        scales = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
        spread = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
        return (quantized.float() * spread).to(output_dtype or torch.bfloat16)


class _Fp8Quantizer(FineGrainedFP8HfQuantizer):
    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": _BlockwiseDequantize}
