"""One router of a model and how to read it: families differ in what a router is called with and in what it returns.

Shapes: N tokens (batch and position flattened), E experts, K experts per token, D hidden size.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from groundwork.errors import ConfigurationError


@dataclass(frozen=True)
class RouterSite:
    """One router of a model: its module, dotted name and model layer, and the MoE block and experts it serves.

    `gives_probabilities` marks routers whose first output is the softmax of their logits.
    """

    module: nn.Module
    name: str
    model_layer: int
    block: nn.Module
    experts: nn.Module
    gives_probabilities: bool = False

    def read(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (logits_NE, weights_NK, ids_NK) of what the router's forward returned.

        Of a router that gives probabilities the logits are their logarithms: the same up to a constant per token.
        """
        if isinstance(output, torch.Tensor):  # the block around it selects: DBRX
            select: Any = self.block.route_tokens_to_experts
            return (output, *select(output))
        logits_NE, weights_NK, ids_NK = output[:3]
        if self.gives_probabilities:
            logits_NE = logits_NE.clamp_min(torch.finfo(logits_NE.dtype).tiny).log()
        return logits_NE, weights_NK, ids_NK

    def logits(self, router_input: torch.Tensor) -> torch.Tensor:
        """Return the router's logits_NE for any hidden states, without setting off the hooks on its module."""
        output = self.module.forward(router_input, **self.arguments(router_input))
        return self.read(output)[0]

    def arguments(self, router_input: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the router is called with beside its input: correction biases that the block keeps for it.

        Token ids, by which DeepSeek-V4's first routers look their experts up, change no logits: zeros stand for them.
        """
        known = {name: getattr(self.block, name, None) for name in self._parameters}
        if "input_ids" in self._parameters:
            known["input_ids"] = router_input.new_zeros(router_input.shape[:-1], dtype=torch.long)
        return {name: value for name, value in known.items() if isinstance(value, torch.Tensor)}

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(type(self.module).forward).parameters)[2:]


def refusal(family: str, reason: str) -> ConfigurationError:
    """Return the error that names a family and why it can not be traced."""
    return ConfigurationError(f"{family} can not be traced: {reason}; choose a model of another family")
