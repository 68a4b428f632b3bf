"""Watching the routers of a model while it runs: hooks keep what they return, whatever runs the layers.

Hooks only keep references, or cast to float16; sorting and the one copy to the CPU come after the forward pass, so that
a GPU never waits for them. Shapes: B sequences, T positions, t of one pass, K experts per token, E experts, M tokens
whose router inputs are kept, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from groundwork.errors import ExpertSpeculationError
from moe.passes import ForwardPass
from moe.routers import RouterLayout, check_received

LOOKAHEAD_NORMS = ("next", "own")


class RouterWatch:
    """Hooks on the routers of `layout`, from `attach` to `detach`, of which those within `watching` keep something.

    `store`, `horizons` and `lookahead_norm` are what ResidentTracer says of them; `family` names the model in errors.
    Raises ValueError for other values.
    """

    def __init__(
        self, layout: RouterLayout, family: str, store: tuple[str, ...], horizons: int, lookahead_norm: str
    ) -> None:
        unknown = set(store) - {"weights", "logits", "lookahead"}
        if unknown:
            raise ValueError(f"store: unknown {sorted(unknown)}; known are weights, logits, lookahead")
        if ("lookahead" in store) != (horizons > 0):
            raise ValueError(f"horizons={horizons}: 'lookahead' in store needs at least 1, and 0 goes without it")
        if lookahead_norm not in LOOKAHEAD_NORMS:
            raise ValueError(f"lookahead_norm={lookahead_norm!r}: must be one of {', '.join(LOOKAHEAD_NORMS)}")
        self.layout, self.store, self.horizons = layout, store, horizons
        self.needs_norms = horizons > 0 and lookahead_norm == "next"
        self._family = family
        self._norms: tuple[nn.Module, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._passes: list[ForwardPass] | None = None
        self._residual: dict[int, torch.Tensor] = {}
        self._hidden_BT: torch.Tensor | None = None
        self._hidden_from = 0
        self._unchecked = set(range(layout.num_layers))

    def attach(self, norms: tuple[nn.Module, ...]) -> None:
        """Set the hooks; `norms` are the normalisations before the routers, where `needs_norms` says so."""
        self._norms = norms
        for index, norm in enumerate(norms):
            self._handles.append(norm.register_forward_pre_hook(self._keep_residual(index)))
        for index, site in enumerate(self.layout.sites):
            self._handles.append(site.module.register_forward_hook(self._keep(index), with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def watching(self, hidden_BT: torch.Tensor | None = None) -> Iterator[list[ForwardPass]]:
        """Record what runs within, in inference mode; yields the list that the passes are added to.

        `hidden_BT` marks, over the positions of all passes, the tokens whose router inputs are kept too. The first
        time, what the experts received is compared with what was kept, and ConfigurationError raised where it differs.
        """
        if not self._handles:
            raise ValueError("recording needs the tracer's context: with ResidentTracer(...) as tracer")
        passes = self._passes = []
        self._hidden_BT, self._hidden_from = hidden_BT, 0
        checks = [self._check(index) for index in self._unchecked]
        try:
            with torch.inference_mode():
                yield passes
        finally:
            for handle in checks:
                handle.remove()
            self._passes = None
            self._residual.clear()

    def check_complete(self, passes: list[ForwardPass], layers: range, count: int = 1) -> None:
        """Raise ExpertSpeculationError unless each router of these MoE layers was called once in each pass."""
        for index in layers:
            calls = sum(index in each.routing for each in passes)
            if calls != count or index in self._unchecked:
                raise ExpertSpeculationError(
                    f"router {self.layout.sites[index].name!r} was called in {calls} of {count} forward passes, or its "
                    "experts were not"
                )

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
                early = self.layout.sites[target]
                if residual is not None:
                    norm = self._norms[target]
                    router_input = norm.forward(_beside(norm, residual)).reshape(router_input.shape)
                early_NE = early.logits(_beside(early.module, router_input))
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
        now.hidden[index] = rows_ND[now.hidden_rows_M.to(rows_ND.device)].to(torch.float16)

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
                    f"the experts beside router {site.name!r} were called without it: {self._family} "
                    "chooses them in a way that hooks do not see, and can not be traced"
                )
            received = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            check_received(site, *self._passes[-1].routing[index], received, self._family)
            self._unchecked.discard(index)

        return site.experts.register_forward_pre_hook(hook, with_kwargs=True)


def _beside(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the device of a module, which may belong to a layer on another one."""
    weight = next(module.parameters(), tensor)
    return tensor.to(weight.device)
