"""Mixed precision in training: products in bfloat16 where the hardware multiplies it, weights and sums in float32."""

from __future__ import annotations

import torch

from groundwork.errors import ConfigurationError

PRECISIONS = ("auto", "float32", "bfloat16")


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether training on `device` multiplies in bfloat16; `auto` does where that is faster.

    Raises ConfigurationError on an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigurationError(f"--precision {precision}: unknown; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
