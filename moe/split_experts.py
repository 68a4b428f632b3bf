"""Splitting fused experts into linear modules, one set per expert, that compute the same.

transformers 5 keeps the experts of a layer fused in 3-D parameters; quantisers work on `nn.Linear` only. The experts of
nearly all families compute down(gate(up(x))), where `up` may be gate and up projection in one and `gate` is the class's
own `_apply_gate`, or its activation alone. `split_loading` fills what stands here while a checkpoint is read.
Shapes: N tokens, K experts per token, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from moe.routers import RouterLayout


@dataclass(frozen=True)
class Split:
    """The names of an expert's linear modules: those that its input goes through, joined in this order, and `down`.

    `stored_singly`: a checkpoint holds them so, under these names; otherwise it holds the experts of a layer fused.
    """

    up: tuple[str, ...]
    down: str
    stored_singly: bool


def find_split(model: PreTrainedModel, layout: RouterLayout) -> Split | None:
    """Return how the experts of `model`, which may be on the meta device, are split; None where they can not be."""
    if not all(_can_be_split(site.experts) for site in layout.sites):
        return None
    fused: Any = layout.sites[0].experts
    conversions = get_model_conversion_mapping(model)
    names = [_names_in_checkpoint(conversions, name) for name in fused_names(fused)]
    if all(names) and getattr(fused, "is_concatenated", True) and not is_transposed(fused):
        return Split(names[0], names[1][0], stored_singly=True)
    return Split(fused_names(fused)[:1], "down_proj", stored_singly=False)


def fused_names(fused: Any) -> tuple[str, str]:
    """Return the names of the two matrix parameters, of which the first may hold gate and up projections together."""
    return "gate_up_proj" if _has_gate(fused) else "up_proj", "down_proj"


def is_transposed(fused: Any) -> bool:
    """Say whether the matrices are stored [E, in, out] where linear modules have [out, in]."""
    return bool(getattr(fused, "is_transposed", False))


def has_bias(fused: Any) -> bool:
    return bool(getattr(fused, "has_bias", False))


def matrix_shapes(fused: Any, split: Split) -> dict[str, tuple[int, int, int]]:
    """Return (number, rows, columns) of the matrices that each fused parameter becomes, by the name of that."""
    shapes = {}
    for name, parts in zip(fused_names(fused), (len(split.up), 1), strict=True):
        num_experts, rows, columns = getattr(fused, name).shape
        if is_transposed(fused):
            rows, columns = columns, rows
        shapes[name] = num_experts * parts, rows // parts, columns
    return shapes


def merges_experts(conversion: Any) -> bool:
    """Say whether one of transformers' conversions makes a fused parameter of experts."""
    target = conversion._original_target_patterns[0]
    return isinstance(conversion, WeightConverter) and target.endswith(
        ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
    )


class PerExpertLinears(nn.Module):
    """The experts of one layer as children `0` ... `E-1`, with the modules that `split` names, called like `fused`.

    What stands between the projections is asked of `fused`, which may be on the meta device: its weights are not used.
    """

    def __init__(self, fused: Any, split: Split) -> None:
        super().__init__()
        self.split = split
        self.__dict__["fused"] = fused  # no child, whose parameters would count as this model's
        if getattr(fused, "has_post_expert_norm", False):
            self.post_expert_norm = fused.post_expert_norm
        (_, width, hidden), (num_experts, _, inner) = matrix_shapes(fused, split).values()
        for index in range(num_experts):
            expert = nn.Module()
            for name in split.up:
                expert.add_module(name, nn.Linear(hidden, width, bias=has_bias(fused)))
            expert.add_module(split.down, nn.Linear(inner, hidden, bias=has_bias(fused)))
            self.add_module(str(index), expert)

    def forward(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the routed experts' outputs, [N, D]."""
        fused: Any = self.__dict__["fused"]
        gate = fused._apply_gate if _has_gate(fused) else fused.act_fn
        total_ND = torch.zeros_like(hidden_ND)
        for index in torch.unique(ids_NK).tolist():
            token, rank = torch.where(ids_NK == index)
            expert = self.get_submodule(str(index))
            rows = hidden_ND[token]
            ups = [expert.get_submodule(name)(rows) for name in self.split.up]
            output = expert.get_submodule(self.split.down)(gate(torch.cat(ups, dim=-1)))
            if hasattr(self, "post_expert_norm"):
                output = self.post_expert_norm(output)
            total_ND.index_add_(0, token, (output * weights_NK[token, rank, None]).to(total_ND.dtype))
        return total_ND


def _has_gate(fused: Any) -> bool:
    return bool(getattr(fused, "has_gate", True))


def _can_be_split(experts: Any) -> bool:
    """Whether the class has a gate of its own and no other parameters than it should have by its own account."""
    if not hasattr(type(experts), "_apply_gate"):
        return False
    expected = set(fused_names(experts))
    if has_bias(experts):
        expected |= {f"{name}_bias" for name in expected}
    if getattr(experts, "has_post_expert_norm", False):
        expected |= {f"post_expert_norm.{name}" for name, _ in experts.post_expert_norm.named_parameters()}
    return expected == {name for name, _ in experts.named_parameters()}


def _names_in_checkpoint(conversions: list[Any], fused_name: str) -> tuple[str, ...]:
    """Return `w1`, `w3` of `.experts.*.w1.weight`, `.experts.*.w3.weight`; nothing unless just stacked and joined."""
    for each in conversions:
        if merges_experts(each) and each._original_target_patterns[0].endswith(f"experts.{fused_name}"):
            sources = each._original_source_patterns
            plain = all(type(operation) in (MergeModulelist, Concatenate) for operation in each.operations)
            if plain and all(".experts.*." in source and source.endswith(".weight") for source in sources):
                return tuple(source.split(".")[-2] for source in sources)
    return ()
