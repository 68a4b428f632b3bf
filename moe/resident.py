"""Tracing a model that fits in memory whole: hooks on its routers keep what they return while a batch runs through.

Hooks only keep references, or cast to float16; sorting and the one copy to the CPU come after the forward pass, so that
a GPU never waits for them. Shapes: B sequences, T positions, N = B*T, L MoE layers, K experts per token, E experts,
H horizons, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from groundwork.errors import ExpertSpeculationError
from moe.routers import RouterLayout, check_received


@dataclass(frozen=True)
class BatchRouting:
    """The routing of one batch, on the CPU; padded positions are included, and mean nothing.

    Experts stand by falling weight, in the router's order where weights are equal. `routing_weights` are what the
    experts received, rounded to float16. `lookahead_logits[b, t, h-1, l]` is layer l's router applied to the input of
    layer (l-h)'s router, and 0 where l < h.
    """

    expert_ids_BTLK: torch.Tensor  # uint8, or int16 where E > 256
    routing_weights_BTLK: torch.Tensor  # float16
    router_logits_BTLE: torch.Tensor | None  # float16
    lookahead_logits_BTHLE: torch.Tensor | None  # float16


class ResidentTracer:
    """A context within which `trace` runs batches through `model` and returns what its routers chose.

    `store` may name "weights" (always returned), "logits" and "lookahead"; lookahead needs `horizons` >= 1. Raises
    ValueError for other values.
    """

    def __init__(
        self, model: PreTrainedModel, layout: RouterLayout, store: tuple[str, ...] = ("weights",), horizons: int = 0
    ) -> None:
        unknown = set(store) - {"weights", "logits", "lookahead"}
        if unknown:
            raise ValueError(f"store: unknown {sorted(unknown)}; known are weights, logits, lookahead")
        if ("lookahead" in store) != (horizons > 0):
            raise ValueError(f"horizons={horizons}: 'lookahead' in store needs at least 1, and 0 goes without it")
        self.model = model
        self.layout = layout
        self.store = store
        self.horizons = horizons
        self._handles: list[RemovableHandle] = []
        self._routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._lookahead_HLNE: torch.Tensor | None = None
        self._num_tokens = 0
        self._unchecked = set(range(layout.num_layers))

    def __enter__(self) -> Self:
        for index, site in enumerate(self.layout.sites):
            self._handles.append(site.module.register_forward_hook(self._keep(index), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def trace(self, input_ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> BatchRouting:
        """Run one right-padded batch and return its routing.

        The first batch also checks that the experts received what was kept, and raises ConfigurationError otherwise.
        Raises ExpertSpeculationError if a router was not called exactly once.
        """
        if not self._handles:
            raise ValueError("trace() needs the tracer's context: with ResidentTracer(...) as tracer")
        B, T = input_ids_BT.shape
        device = self.model.device
        self._begin(B * T, device)
        checks = [self._check(index) for index in self._unchecked]
        mask_BT = torch.arange(T)[None, :] < lengths_B.cpu()[:, None]
        try:
            with torch.inference_mode():
                self.model(
                    input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device, torch.long), use_cache=False
                )
                return self._collect(B, T)
        finally:
            for handle in checks:
                handle.remove()
            self._begin(0, device)

    def _begin(self, num_tokens: int, device: torch.device) -> None:
        self._routing, self._logits, self._num_tokens = {}, {}, num_tokens
        shape = (self.horizons, self.layout.num_layers, num_tokens, self.layout.num_experts)
        lookahead = self.horizons > 0 and num_tokens > 0
        self._lookahead_HLNE = torch.zeros(shape, dtype=torch.float16, device=device) if lookahead else None

    def _keep(self, index: int) -> Callable[..., None]:
        """Return the hook of router `index`."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._num_tokens:
                return
            if index in self._routing:
                raise ExpertSpeculationError(f"router {self.layout.sites[index].name!r} was called twice in one pass")
            logits_NE, weights_NK, ids_NK = output[:3]
            self._routing[index] = (ids_NK, weights_NK)
            if "logits" in self.store:
                self._logits[index] = logits_NE.to(torch.float16)
            if self._lookahead_HLNE is not None:
                router_input = args[0] if args else next(iter(kwargs.values()))
                targets = self.layout.sites[index + 1 : index + 1 + self.horizons]
                for ahead, target in enumerate(targets):
                    self._lookahead_HLNE[ahead, index + 1 + ahead] = target.logits(router_input)

        return hook

    def _check(self, index: int) -> RemovableHandle:
        """Compare, when the experts of layer `index` are called, what they receive with what was kept."""
        site = self.layout.sites[index]

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            check_received(site, *self._routing[index], received, type(self.model).__name__)
            self._unchecked.discard(index)

        return site.experts.register_forward_pre_hook(hook, with_kwargs=True)

    def _collect(self, B: int, T: int) -> BatchRouting:
        missing = [site.name for index, site in enumerate(self.layout.sites) if index not in self._routing]
        if missing or self._unchecked:
            name = missing[0] if missing else self.layout.sites[min(self._unchecked)].name
            raise ExpertSpeculationError(f"router {name!r} or its experts were not called in the forward pass")
        layers = range(self.layout.num_layers)
        ids_LNK = torch.stack([self._routing[layer][0] for layer in layers])
        weights_LNK = torch.stack([self._routing[layer][1] for layer in layers])
        # Sorted before rounding, so that weights that only float16 makes equal keep the router's preference.
        weights_LNK, order_LNK = weights_LNK.sort(dim=-1, descending=True, stable=True)
        ids_LNK = ids_LNK.gather(-1, order_LNK)

        def to_cpu(tensor_LNX: torch.Tensor) -> torch.Tensor:
            """[L, B*T, X] -> [B, T, L, X] in host memory."""
            return _to_host(tensor_LNX.reshape(len(layers), B, T, -1).permute(1, 2, 0, 3))

        ids_BTLK = to_cpu(ids_LNK.to(torch.uint8 if self.layout.num_experts <= 256 else torch.int16))
        weights_BTLK = to_cpu(weights_LNK.to(torch.float16))
        logits_BTLE = to_cpu(torch.stack([self._logits[layer] for layer in layers])) if self._logits else None
        lookahead_BTHLE = None
        if self._lookahead_HLNE is not None:
            # [H, L, B*T, E] -> [B, T, H, L, E]
            lookahead_BTHLE = _to_host(
                self._lookahead_HLNE.reshape(self.horizons, len(layers), B, T, -1).permute(2, 3, 0, 1, 4)
            )
        if weights_LNK.is_cuda:
            torch.cuda.current_stream(weights_LNK.device).synchronize()
        return BatchRouting(ids_BTLK, weights_BTLK, logits_BTLE, lookahead_BTHLE)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU; from a GPU into pinned memory, complete only once the stream is synchronised."""
    tensor = tensor.contiguous()
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
