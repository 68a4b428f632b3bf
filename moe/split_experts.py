"""Splitting fused experts into one set of `nn.Linear` per expert, under the names that the checkpoint has for them.

transformers 5 merges the experts of a layer into 3-D parameters while it loads, by converters that know the
checkpoint's names; quantisers work on `nn.Linear` only. Shapes: N tokens, K experts per token, D hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.moe import _default_apply_gate

from moe.routers import RouterLayout


def expert_projections(model: PreTrainedModel, layout: RouterLayout) -> tuple[str, str, str] | None:
    """Return the checkpoint's names of an expert's gate, up and down projections; None where experts can not be split.

    They can where a checkpoint holds them one by one and they compute down(act(gate(x)) * up(x)), without biases.
    """
    gate_up, down = merging_converters(get_model_conversion_mapping(model))
    names = (*_linear_names(gate_up), *_linear_names(down))
    if len(names) != 3 or not all(_is_plain(site.experts) for site in layout.sites):
        return None
    return names


class PerExpertLinears(nn.Module):
    """The experts of one layer as children `0` ... `E-1`, gated feed-forward modules, called as fused experts are."""

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        num_experts, double_width, hidden = fused.gate_up_proj.shape
        gate, up, down = names
        self.act_fn = fused.act_fn
        self.names = names
        for index in range(num_experts):
            expert = nn.Module()
            expert.add_module(gate, nn.Linear(hidden, double_width // 2, bias=False))
            expert.add_module(up, nn.Linear(hidden, double_width // 2, bias=False))
            expert.add_module(down, nn.Linear(double_width // 2, hidden, bias=False))
            self.add_module(str(index), expert)

    def forward(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the routed experts' outputs, [N, D]."""
        total_ND = torch.zeros_like(hidden_ND)
        for index in torch.unique(ids_NK).tolist():
            token, rank = torch.where(ids_NK == index)
            gate, up, down = [self.get_submodule(f"{index}.{name}") for name in self.names]
            rows = hidden_ND[token]
            output = down(self.act_fn(gate(rows)) * up(rows)) * weights_NK[token, rank, None]
            total_ND.index_add_(0, token, output.to(total_ND.dtype))
        return total_ND


def merging_converters(conversions: list[Any]) -> tuple[Any, Any]:
    """Return the converters that fill `experts.gate_up_proj` and `experts.down_proj`; None where there is none."""

    def filling(target: str) -> Any:
        fitting = [
            each
            for each in conversions
            if isinstance(each, WeightConverter) and each._original_target_patterns[0].endswith(target)
        ]
        return fitting[0] if fitting else None

    return filling("experts.gate_up_proj"), filling("experts.down_proj")


def _linear_names(converter: Any) -> list[str]:
    """`.experts.*.w1.weight` -> `w1`; nothing for checkpoints that hold the experts fused."""
    patterns = converter._original_source_patterns if converter else []
    return [pattern.split(".")[-2] for pattern in patterns if pattern.endswith(".weight") and ".experts.*." in pattern]


def _is_plain(experts: nn.Module) -> bool:
    """Whether the experts compute down(act(gate(x)) * up(x)) without biases."""
    return (
        getattr(type(experts), "_apply_gate", None) is _default_apply_gate
        and bool(getattr(experts, "has_gate", False))
        and bool(getattr(experts, "is_concatenated", False))
        and not any(getattr(experts, flag, False) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    )
