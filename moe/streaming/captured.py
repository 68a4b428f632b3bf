"""What one layer's router showed of one batch, as named tensors in host memory, and all layers' together again."""

from collections.abc import Iterable, Mapping

import torch

from moe.passes import BatchRouting, ForwardPass, gather_passes


def pack(shown: ForwardPass) -> dict[str, torch.Tensor]:
    """Return the tensors of a pass through one layer, or some, by names that `unpack` understands."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, (ids_NK, weights_NK) in shown.routing.items():
        tensors[f"ids.{layer}"] = ids_NK.to(torch.int16)
        tensors[f"weights.{layer}"] = weights_NK
    tensors |= {f"logits.{layer}": logits_NE for layer, logits_NE in shown.logits.items()}
    tensors |= {f"lookahead.{ahead}.{layer}": early_NE for (ahead, layer), early_NE in shown.lookahead.items()}
    tensors |= {f"hidden.{layer}": input_MD for layer, input_MD in shown.hidden.items()}
    if shown.hidden and shown.hidden_at_M2 is not None:
        tensors["hidden_at"] = shown.hidden_at_M2
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def join(parts: Iterable[tuple[int, Mapping[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Return what `pack` would make of a batch, from what it made of parts with so many sequences each."""
    gathered: dict[str, list[torch.Tensor]] = {}
    first = 0
    for sequences, tensors in parts:
        for name, tensor in tensors.items():
            moved = tensor + torch.tensor([first, 0]) if name == "hidden_at" else tensor
            gathered.setdefault(name, []).append(moved)
        first += sequences
    return {name: torch.cat(tensors) for name, tensors in gathered.items()}


def unpack(layers: Iterable[Mapping[str, torch.Tensor]], B: int, num_experts: int, horizons: int) -> BatchRouting:
    """Return the routing of a batch of B sequences from what `pack` made of each of its layers."""
    whole = ForwardPass()
    for tensors in layers:
        for name, tensor in tensors.items():
            kind, *numbers = name.split(".")
            layer = int(numbers[-1]) if numbers else -1
            if kind == "ids":
                whole.routing[layer] = (tensor.long(), tensors[f"weights.{layer}"])
            elif kind == "logits":
                whole.logits[layer] = tensor
            elif kind == "lookahead":
                whole.lookahead[int(numbers[0]), layer] = tensor
            elif kind == "hidden":
                whole.hidden[layer] = tensor
            elif kind == "hidden_at":
                whole.hidden_at_M2 = tensor
    return gather_passes([whole], B, num_experts, horizons)
