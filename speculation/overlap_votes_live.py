"""Overlap votes one step at a time: running sums of what the token in progress shares with each earlier one.

Arrays over W = window places are rings: token c lies at place c % window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculation.overlap_votes import DECAYS, KERNELS, null_weight, scales
from speculation.predictor import RoutingShape


class OverlapMemory:
    """Sets, residuals and overlaps of one sequence for one horizon; `observe` every step in decoding order.

    own_GW: what the token in progress shares with earlier ones so far. sums_GW: that, and before it what the token
    before it shares with the one before each.
    """

    def __init__(self, shape: RoutingShape, horizon: int, window: int, device: torch.device) -> None:
        self.shape, self.horizon, self.window = shape, horizon, window
        layers, experts = shape.num_layers, shape.num_experts
        self.steps = 0
        self.sets_LWE = torch.zeros(layers, window, experts, device=device)
        self.residual_LWE = torch.zeros_like(self.sets_LWE)
        self.own_GW = torch.zeros(len(DECAYS), window, device=device)
        self.sums_GW = torch.zeros_like(self.own_GW)
        self.decay_G1 = torch.tensor(DECAYS, device=device)[:, None]
        self.kind_J = torch.tensor([kernel.decay for kernel in KERNELS], device=device)
        self.null_J1 = torch.tensor([null_weight(kernel) for kernel in KERNELS], device=device)[:, None]
        # Exponents without overlap by place, twice over, so that each rotation of them is a slice.
        ago_W = torch.arange(window, 0, -1, device=device).repeat(2)
        self.penalty_JW = torch.stack([-kernel.fading * ago_W - kernel.sharpness for kernel in KERNELS])
        self.scale_NJ1 = torch.tensor(
            [scales(steps, shape.top_k) for steps in range(1, 2 * layers + 1)], device=device
        )[..., None]

    def observe(self, set_E: Tensor, residual_E: Tensor) -> None:
        """Takes the next step's set, and that less what was guessed."""
        token, layer = divmod(self.steps, self.shape.num_layers)
        known = min(token, self.window)
        shared_W = self.sets_LWE[layer, :known] @ set_E
        for overlap_GW in (self.own_GW, self.sums_GW):
            overlap_GW[:, :known].mul_(self.decay_G1).add_(shared_W)
        self.sets_LWE[layer, token % self.window] = set_E
        self.residual_LWE[layer, token % self.window] = residual_E
        self.steps += 1
        if layer == self.shape.num_layers - 1:
            self.sums_GW = self.own_GW.roll(1, dims=1)
            self.own_GW.zero_()

    def votes(self) -> Tensor:
        """The weighted mean residuals (J, E) for the step `horizon` after the last observed."""
        layers = self.shape.num_layers
        token, layer = divmod(self.steps - 1 + self.horizon, layers)
        # A step of the token after the one in progress: that one is its token before, as far as it is known.
        sums_GW = self.sums_GW if token == self.steps // layers else self.own_GW.roll(1, dims=1)
        known = min(token, self.window)
        rotation = (-token) % self.window
        weights_JW = self.penalty_JW[:, rotation : rotation + known].addcmul(
            sums_GW[self.kind_J, :known], self.scale_NJ1[layers + layer - self.horizon]
        )
        weights_JW = weights_JW.exp_()
        weights_JW /= weights_JW.sum(dim=1, keepdim=True) + self.null_J1
        return weights_JW @ self.residual_LWE[layer, :known]
