"""Small parts of networks whose layers all have weights of their own: (L, T, X) times (L, X, Y), one product a layer.

Training noise is drawn from the generator given, so that a resumed training draws the same; None turns it off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def table(generator: torch.Generator, *size: int, scale: float) -> nn.Parameter:
    """Normally distributed weights."""
    return nn.Parameter(torch.randn(*size, generator=generator) * scale)


def unit(values: Tensor) -> Tensor:
    """Root-mean-square normalisation of the last dimension; a gain would be absorbed by the weights that follow."""
    return F.rms_norm(values, values.shape[-1:], eps=1e-5)


def gelu(values: Tensor) -> Tensor:
    """The tanh form, which is the faster one on CPUs."""
    return F.gelu(values, approximate="tanh")


def drop(values_LTX: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Dropout with one mask for all layers: drawing one for each costs as much as the product that follows."""
    if generator is None or share == 0:
        return values_LTX
    kept = torch.rand(values_LTX.shape[-2:], generator=generator, device=values_LTX.device) >= share
    return values_LTX * (kept.to(values_LTX.dtype) / (1 - share))


def working_dtype(device: torch.device) -> torch.dtype:
    """What products are computed in: autocast's type where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def token_before(values_LTX: Tensor, starts_S: Tensor) -> Tensor:
    """The values of the token before along dimension -2, zeros for each sequence's first token."""
    shifted = torch.zeros_like(values_LTX)
    shifted[..., 1:, :] = values_LTX[..., :-1, :]
    shifted[..., starts_S, :] = 0
    return shifted
