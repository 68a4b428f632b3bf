"""Tracing a model that fits in memory whole: hooks on its routers keep what they return while a batch runs through.

Hooks only keep references, or cast to float16; sorting and the one copy to the CPU come after the forward pass, so that
a GPU never waits for them. Shapes: B sequences, T positions, t of one pass, N = B*t, K experts per token, E experts, M
tokens whose router inputs are kept, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from groundwork.errors import ExpertSpeculationError
from moe.norms import find_norms
from moe.passes import BatchRouting, ForwardPass, gather_passes
from moe.routers import RouterLayout, check_received

LOOKAHEAD_NORMS = ("next", "own")


class ResidentTracer:
    """A context within which `trace` runs batches through `model` and returns what its routers chose.

    `store` may name "weights" (always returned), "logits" and "lookahead"; lookahead needs `horizons` >= 1. Layer l's
    router is then asked h layers early: on the residual stream before layer (l-h)'s router, normalised by layer l's own
    norm (`lookahead_norm="next"`), or on layer (l-h)'s router input as it is ("own"). Raises ValueError for other
    values, and on entering ConfigurationError where a model has no such norms.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: RouterLayout,
        store: tuple[str, ...] = ("weights",),
        horizons: int = 0,
        lookahead_norm: str = "next",
    ) -> None:
        unknown = set(store) - {"weights", "logits", "lookahead"}
        if unknown:
            raise ValueError(f"store: unknown {sorted(unknown)}; known are weights, logits, lookahead")
        if ("lookahead" in store) != (horizons > 0):
            raise ValueError(f"horizons={horizons}: 'lookahead' in store needs at least 1, and 0 goes without it")
        if lookahead_norm not in LOOKAHEAD_NORMS:
            raise ValueError(f"lookahead_norm={lookahead_norm!r}: must be one of {', '.join(LOOKAHEAD_NORMS)}")
        self.model = model
        self.layout = layout
        self.store = store
        self.horizons = horizons
        self.lookahead_norm = lookahead_norm
        self._norms: tuple[torch.nn.Module, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._passes: list[ForwardPass] | None = None
        self._residual: dict[int, torch.Tensor] = {}
        self._hidden_BT: torch.Tensor | None = None
        self._hidden_from = 0
        self._unchecked = set(range(layout.num_layers))

    def __enter__(self) -> Self:
        if self.horizons and self.lookahead_norm == "next":
            self._norms = find_norms(self.model, self.layout)
            for index, norm in enumerate(self._norms):
                self._handles.append(norm.register_forward_pre_hook(self._keep_residual(index)))
        for index, site in enumerate(self.layout.sites):
            self._handles.append(site.module.register_forward_hook(self._keep(index), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def trace(
        self, input_ids_BT: torch.Tensor, lengths_B: torch.Tensor, hidden_BT: torch.Tensor | None = None
    ) -> BatchRouting:
        """Run one right-padded batch and return its routing; raises as `recording` does."""
        B, T = input_ids_BT.shape
        device = self.model.device
        mask_BT = torch.arange(T)[None, :] < lengths_B.cpu()[:, None]
        with self.recording(hidden_BT) as gathered:
            self.model(
                input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device, torch.long), use_cache=False
            )
            return gathered(B, 1)

    @contextmanager
    def recording(self, hidden_BT: torch.Tensor | None = None) -> Iterator[Callable[[int, int], BatchRouting]]:
        """Record the forward passes within; yields the function that returns them, given B and how many they were.

        `hidden_BT` marks, over the positions of all passes, the tokens whose router inputs are returned too.
        The first time, what the experts received is compared with what was kept, and ConfigurationError raised where it
        differs. The function raises ExpertSpeculationError if a router was not called exactly once in each pass.
        """
        if not self._handles:
            raise ValueError("recording needs the tracer's context: with ResidentTracer(...) as tracer")
        passes = self._passes = []
        self._hidden_BT, self._hidden_from = hidden_BT, 0
        checks = [self._check(index) for index in self._unchecked]

        def gathered(batch_size: int, count: int) -> BatchRouting:
            self._check_complete(count)
            return gather_passes(passes, batch_size, self.layout.num_experts, self.horizons)

        try:
            with torch.inference_mode():
                yield gathered
        finally:
            for handle in checks:
                handle.remove()
            self._passes = None
            self._residual.clear()

    def _keep(self, index: int) -> Callable[..., None]:
        """Return the hook of router `index`."""
        site = self.layout.sites[index]

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._passes is None:
                return
            if index == 0 or not self._passes:
                self._passes.append(ForwardPass())  # layers run in order
            now = self._passes[-1]
            router_input = args[0] if args else next(iter(kwargs.values()))
            if index in now.routing:
                raise ExpertSpeculationError(f"router {site.name!r} was called twice in one pass")
            logits_NE, weights_NK, ids_NK = site.read(output)
            now.routing[index] = (ids_NK, weights_NK)
            if "logits" in self.store:
                now.logits[index] = logits_NE.to(torch.float16)
            targets = range(index + 1, min(index + 1 + self.horizons, self.layout.num_layers))
            self._keep_hidden(now, index, router_input)
            residual = self._residual.pop(index, None)
            for ahead, target in enumerate(targets):
                if residual is not None:
                    router_input = self._norms[target].forward(residual).reshape(router_input.shape)
                early_NE = self.layout.sites[target].logits(router_input)
                now.lookahead[ahead, target] = early_NE.to(torch.float16)

        return hook

    def _keep_hidden(self, now: ForwardPass, index: int, router_input: torch.Tensor) -> None:
        """Keep the inputs of the marked tokens; the first router of a pass finds out which of its rows they are."""
        if self._hidden_BT is None:
            return
        rows_ND = router_input.reshape(-1, router_input.shape[-1])
        if now.hidden_rows_M is None:
            start = self._hidden_from
            self._hidden_from += len(rows_ND) // len(self._hidden_BT)
            marked_Bt = self._hidden_BT[:, start : self._hidden_from]
            now.hidden_at_M2 = marked_Bt.nonzero() + torch.tensor([0, start])
            now.hidden_rows_M = marked_Bt.reshape(-1).nonzero().squeeze(1).to(rows_ND.device)
        now.hidden[index] = rows_ND[now.hidden_rows_M].to(torch.float16)

    def _keep_residual(self, index: int) -> Callable[..., None]:
        """Return the hook of the norm before router `index`."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if self._passes is not None:
                self._residual[index] = args[0]

        return hook

    def _check(self, index: int) -> RemovableHandle:
        """Compare, when the experts of layer `index` are called, what they receive with what was kept."""
        site = self.layout.sites[index]

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._passes is None:
                return
            if not self._passes or index not in self._passes[-1].routing:
                raise ExpertSpeculationError(
                    f"the experts beside router {site.name!r} were called without it: {type(self.model).__name__} "
                    "chooses them in a way that hooks do not see, and can not be traced"
                )
            received = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            check_received(site, *self._passes[-1].routing[index], received, type(self.model).__name__)
            self._unchecked.discard(index)

        return site.experts.register_forward_pre_hook(hook, with_kwargs=True)

    def _check_complete(self, count: int) -> None:
        passes = self._passes or []
        for index, site in enumerate(self.layout.sites):
            calls = sum(index in each.routing for each in passes)
            if calls != count or index in self._unchecked:
                raise ExpertSpeculationError(
                    f"router {site.name!r} was called in {calls} of {count} forward passes, or its experts were not"
                )
