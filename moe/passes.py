"""What the routers showed in one or more forward passes, and its way into host memory.

Shapes: B sequences, T positions, t positions of one pass, N = B*t, L MoE layers, K experts per token, E experts, H
horizons, M tokens whose router inputs are kept, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class BatchRouting:
    """The routing of one batch, on the CPU; padded positions are included, and mean nothing.

    Experts stand by falling weight, in the router's order where weights are equal. `routing_weights` are what the
    experts received, rounded to float16. `lookahead_logits[b, t, h-1, l]` is what layer l's router says h layers early,
    and 0 where l < h. Where the model decoded, prompts end at the same position and decoded tokens follow:
    `first_B` is each sequence's first position, `decoded_BN` what was decoded, and `withheld_B` says where a token that
    would have ended the text was not let through.
    """

    expert_ids_BTLK: torch.Tensor  # uint8, or int16 where E > 256
    routing_weights_BTLK: torch.Tensor  # float16
    router_logits_BTLE: torch.Tensor | None  # float16
    lookahead_logits_BTHLE: torch.Tensor | None  # float16
    first_B: torch.Tensor
    hidden_at_M2: torch.Tensor | None = None  # (sequence, position) of the M tokens whose router inputs were asked for
    router_input_MLD: torch.Tensor | None = None  # float16
    decoded_BN: torch.Tensor | None = None
    withheld_B: torch.Tensor | None = None


@dataclass
class ForwardPass:
    """What the routers have shown in a pass so far, by MoE layer, each where that layer runs."""

    routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # ids_NK, weights_NK
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # float16 NE
    lookahead: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (h-1, target layer): float16 NE
    hidden_at_M2: torch.Tensor | None = None
    hidden_rows_M: torch.Tensor | None = None  # the same, as rows of the routers' inputs
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # float16 MD


def gather_passes(passes: list[ForwardPass], batch_size: int, num_experts: int, horizons: int) -> BatchRouting:
    """Return consecutive passes over the same B sequences as one batch; each must hold all layers."""
    layers = range(len(passes[0].routing))
    home = passes[0].routing[0][0].device  # a model may lie on several, and what is small comes together on one

    def stacked(of: Callable[[ForwardPass, int], torch.Tensor]) -> torch.Tensor:
        """[L, B, T, X]: layers stacked, the passes one behind the other."""
        rows = [
            torch.cat([of(each, layer).reshape(batch_size, -1, of(each, layer).shape[-1]) for each in passes], dim=1)
            for layer in layers
        ]
        return torch.stack([row.to(home) for row in rows])

    ids_LBTK = stacked(lambda each, layer: each.routing[layer][0])
    weights_LBTK = stacked(lambda each, layer: each.routing[layer][1])
    # Sorted before rounding, so that weights that only float16 makes equal keep the router's preference.
    weights_LBTK, order_LBTK = weights_LBTK.sort(dim=-1, descending=True, stable=True)
    ids_LBTK = ids_LBTK.gather(-1, order_LBTK).to(torch.uint8 if num_experts <= 256 else torch.int16)
    logits_BTLE = lookahead_BTHLE = None
    if passes[0].logits:
        logits_BTLE = _to_host(stacked(lambda each, layer: each.logits[layer]).permute(1, 2, 0, 3))
    if horizons:
        shape = (horizons, len(layers), batch_size, ids_LBTK.shape[2], num_experts)
        lookahead_HLBTE = torch.zeros(shape, dtype=torch.float16, device=home)
        for ahead, layer in passes[0].lookahead:
            parts = [each.lookahead[ahead, layer].to(home).reshape(batch_size, -1, num_experts) for each in passes]
            torch.cat(parts, dim=1, out=lookahead_HLBTE[ahead, layer])
        lookahead_BTHLE = _to_host(lookahead_HLBTE.permute(2, 3, 0, 1, 4))
    hidden_at_M2 = router_input_MLD = None
    if passes[0].hidden:
        hidden_at_M2 = torch.cat([each.hidden_at_M2 for each in passes if each.hidden_at_M2 is not None])
        inputs_LMD = torch.stack([torch.cat([each.hidden[layer] for each in passes]).to(home) for layer in layers])
        router_input_MLD = _to_host(inputs_LMD.permute(1, 0, 2))
    ids_BTLK = _to_host(ids_LBTK.permute(1, 2, 0, 3))
    weights_BTLK = _to_host(weights_LBTK.to(torch.float16).permute(1, 2, 0, 3))
    if ids_LBTK.is_cuda:
        torch.cuda.current_stream(home).synchronize()
    return BatchRouting(
        ids_BTLK,
        weights_BTLK,
        logits_BTLE,
        lookahead_BTHLE,
        first_B=torch.zeros(batch_size, dtype=torch.long),
        hidden_at_M2=hidden_at_M2,
        router_input_MLD=router_input_MLD,
    )


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU; from a GPU into pinned memory, complete only once the stream is synchronised."""
    tensor = tensor.contiguous()
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
