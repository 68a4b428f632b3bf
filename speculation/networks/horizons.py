"""How far ahead a training step of a network that serves several horizons looks."""

from __future__ import annotations

import torch

from speculation.predictor import MAX_HORIZON

HORIZON_SHARES = (0.6, 0.2, 0.2)  # of training steps; horizon 1 is what most readers ask for


def draw_horizon(num_layers: int, generator: torch.Generator) -> int:
    """1 to 3, as far as there are layers."""
    shares = torch.tensor(HORIZON_SHARES[: min(MAX_HORIZON, num_layers)])
    return int(torch.multinomial(shares, 1, generator=generator)) + 1
