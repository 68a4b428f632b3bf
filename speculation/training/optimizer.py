"""Muon for matrices and AdamW for the rest, as one optimizer whose state is tensors by parameter name.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along the nearest orthogonal one to
its momentum, found by five Newton-Schulz steps. torch.optim.Muon takes single matrices; here a parameter of three
dimensions is a batch of them, as InterLayer's per-layer tables are, at the cost of one batched product per step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from groundwork.errors import ConfigurationError

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at zero, by Jordan et al.; torch.optim.Muon's too
MOMENTUM = 0.95
MUON_DECAY = 0.1
MUON_RATE = 10.0  # times AdamW's learning rate
ADAM_BETAS = (0.9, 0.98)
ADAM_DECAY = 0.05  # of matrices; vectors and scalars are not decayed
CLIP = 1.0  # gradient norm of AdamW's parameters; Muon's steps have a fixed size


class MuonAdamW:
    """`step` after a backward pass; `rate` in it scales both learning rates, `learning_rate` being AdamW's.

    Raises ValueError where `muon_names` are not parameters of two or three dimensions.
    """

    def __init__(self, module: nn.Module, muon_names: Collection[str], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._named = dict(module.named_parameters())
        wrong = [name for name in muon_names if name not in self._named or self._named[name].dim() not in (2, 3)]
        if wrong:
            raise ValueError(f"Muon trains matrices and batches of matrices, not {', '.join(wrong)}")
        self._momentum = {name: torch.zeros_like(self._named[name]) for name in muon_names}
        self._rest = {name: each for name, each in self._named.items() if name not in self._momentum}
        decayed = {name for name, each in self._rest.items() if each.dim() >= 2 and each.shape[-1] > 1}
        self._order = [*(n for n in self._rest if n in decayed), *(n for n in self._rest if n not in decayed)]
        groups = [
            {"params": [self._rest[name] for name in self._order if name in decayed], "weight_decay": ADAM_DECAY},
            {"params": [self._rest[name] for name in self._order if name not in decayed], "weight_decay": 0.0},
        ]
        self._adam = (
            torch.optim.AdamW([g for g in groups if g["params"]], learning_rate, ADAM_BETAS, fused=True)
            if self._rest
            else None
        )

    def step(self, rate: float = 1.0) -> None:
        """Moves every parameter that has a gradient."""
        if self._adam is not None:
            torch.nn.utils.clip_grad_norm_(self._rest.values(), CLIP)
            for group in self._adam.param_groups:
                group["lr"] = self.learning_rate * rate
            self._adam.step()
        for name, momentum in self._momentum.items():
            parameter = self._named[name]
            if parameter.grad is not None:
                muon_step(parameter, parameter.grad, momentum, MUON_RATE * self.learning_rate * rate)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self._named.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Momenta and moments as `<parameter>/<moment>`."""
        found = {f"{name}/momentum": momentum for name, momentum in self._momentum.items()}
        for name, parameter in self._rest.items():
            moments = self._adam.state[parameter] if self._adam is not None else {}
            found |= {f"{name}/{key}": value for key, value in moments.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; raises ConfigurationError where it is another module's."""
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, moment = key.rsplit("/", 1)
            moments.setdefault(name, {})[moment] = tensor
        if not moments.keys() <= self._named.keys() or not self._momentum.keys() <= moments.keys():
            raise ConfigurationError("the checkpoint's optimizer is one of another predictor; train again")
        for name, momentum in self._momentum.items():
            momentum.copy_(moments[name]["momentum"])
        if self._adam is not None:
            per_index = {i: moments[name] for i, name in enumerate(self._order) if name in moments}
            self._adam.load_state_dict({**self._adam.state_dict(), "state": per_index})


@torch.no_grad()
def muon_step(parameter: Tensor, gradient: Tensor, momentum: Tensor, learning_rate: float) -> None:
    """One step in place with decoupled weight decay and Nesterov momentum, for a matrix or a batch (N, A, B)."""
    momentum.lerp_(gradient, 1 - MOMENTUM)
    update = orthogonal(gradient.lerp(momentum, MOMENTUM))
    rows, columns = parameter.shape[-2:]
    parameter.mul_(1 - learning_rate * MUON_DECAY)
    parameter.add_(update.to(parameter.dtype), alpha=-learning_rate * math.sqrt(max(1.0, rows / columns)))


def orthogonal(matrices: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix to each one (..., A, B): singular values between 0.5 and 1.5, bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)
