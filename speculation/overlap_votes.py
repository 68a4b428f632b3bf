"""Overlap votes: how wrong was a first guess at earlier tokens that went the same way as this one?

Every earlier token of the sequence votes with its residual at the layer in question, the chosen set less what was
guessed there. A vote's weight rises with the experts that the two tokens share at the steps before, in decoding order:
fixed kernels without parameters, so that the votes need no gradient. One vote for nothing stands beside them, which
weighs as much as a token that shares half of all there is to share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256  # tokens that receive votes at once; bounds memory


class Kernel(NamedTuple):
    """A vote's weight: exp(sharpness * (overlap - 1) - fading * tokens ago), overlap from 0 to 1."""

    decay: int  # index in DECAYS
    sharpness: float
    fading: float


DECAYS = (1.0, 0.9)  # per step: how fast a shared expert of a step further back counts less
KERNELS = (Kernel(0, 24.0, 0.005), Kernel(0, 12.0, 0.002), Kernel(1, 16.0, 0.005))
NULL = 0.5  # the overlap of the vote for nothing


@torch.no_grad()
def overlap_votes(
    hot_LTE: Tensor,
    before_LTE: Tensor,
    residual_LTE: Tensor,
    offsets: Sequence[int],
    horizon: int,
    top_k: int,
    window: int,
) -> Tensor:
    """For each kernel the weighted mean (L, J, T, E) of the residuals of tokens at most `window` tokens back.

    `before_LTE` are the sets of the token before. Shared steps are those of the token before and of this one up to
    `horizon` steps below the layer.
    """
    layers, _, experts = hot_LTE.shape
    path_PTE = torch.cat([before_LTE, hot_LTE])
    parts = []
    for start, stop in pairwise(offsets):
        for first in range(start, stop, ROWS):
            rows, seen = (
                slice(first, min(first + ROWS, stop)),
                slice(max(start, first - window), min(first + ROWS, stop)),
            )
            penalties = _penalties(first - seen.start, window, hot_LTE.device)
            penalty_JTC = penalties[:, : rows.stop - rows.start, : seen.stop - seen.start]
            sums = [torch.zeros_like(penalty_JTC[0]) for _ in DECAYS]
            votes_LJTE = hot_LTE.new_empty(layers, len(KERNELS), rows.stop - rows.start, experts)
            done = 0
            for layer in range(layers):
                steps = layers + layer - horizon + 1
                for step in range(done, steps):
                    shared_TC = (path_PTE[step, rows] @ path_PTE[step, seen].T).float()
                    for sums_TC, decay in zip(sums, DECAYS, strict=True):
                        sums_TC.mul_(decay).add_(shared_TC)
                done = steps
                for index, (kernel, scale) in enumerate(zip(KERNELS, scales(steps, top_k), strict=True)):
                    weights_TC = torch.add(penalty_JTC[index], sums[kernel.decay], alpha=scale).exp_()
                    weights_TC /= weights_TC.sum(dim=1, keepdim=True) + null_weight(kernel)
                    votes_LJTE[layer, index] = weights_TC.to(hot_LTE.dtype) @ residual_LTE[layer, seen]
            parts.append(votes_LJTE)
    return torch.cat(parts, dim=2)


@lru_cache(maxsize=1024)
def scales(steps: int, top_k: int) -> tuple[float, ...]:
    """What a kernel multiplies summed overlaps of so many steps by: its sharpness over the most that can be shared."""
    most = [top_k * sum(decay**step for step in range(steps)) for decay in DECAYS]
    return tuple(kernel.sharpness / most[kernel.decay] for kernel in KERNELS)


def null_weight(kernel: Kernel) -> float:
    """The weight of the vote for nothing, on the scale of exp(sharpness * (overlap - 1))."""
    return float(torch.tensor((NULL - 1) * kernel.sharpness).exp())


@lru_cache(maxsize=32)
def _penalties(before: int, window: int, device: torch.device) -> Tensor:
    """The exponents' part without overlap, (J, ROWS, before + ROWS); -inf for tokens that have no vote."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        ago_TC = torch.arange(ROWS, device=device)[:, None] + before - torch.arange(before + ROWS, device=device)
        penalty_JTC = torch.stack([-kernel.fading * ago_TC - kernel.sharpness for kernel in KERNELS])
        return penalty_JTC.masked_fill_((ago_TC < 1) | (ago_TC > window), -torch.inf)
