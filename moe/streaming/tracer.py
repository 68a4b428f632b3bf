"""Tracing a model layer by layer: batches go through one layer, are set aside, and go through the next.

What comes of a batch is bitwise what a model that is in memory whole makes of it: the same modules run on the same
batches, given what the model's own forward gives them. Shapes: B sequences, T positions, D hidden size (some families
carry more than D numbers a position, in dimensions of their own).
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import nn

from groundwork.errors import ConfigurationError
from groundwork.progress import progress
from moe.norms import find_norms
from moe.streaming.calls import LayerCalls
from moe.streaming.captured import pack
from moe.streaming.layered import LayeredModel
from moe.streaming.reader import LayersAhead
from moe.watching import RouterWatch


class StreamedTracer:
    """A context within which `run` takes batches through one layer of `layered` and says what its router chose.

    `store`, `horizons` and `lookahead_norm` are ResidentTracer's. Entering reads every layer once: two tokens run
    through them, to see that the family can be run so and which norms stand before the routers, and `visit` is given
    the dotted name and module of each layer while its weights are there, before they compute; and before them the model
    itself, with what lies outside of layers. Routers stay in memory from then on. Raises ConfigurationError where the
    family, or the checkpoint, can not be used.
    """

    def __init__(
        self,
        layered: LayeredModel,
        store: tuple[str, ...] = ("weights",),
        horizons: int = 0,
        lookahead_norm: str = "next",
        visit: Callable[[str, nn.Module], None] = lambda name, module: None,
    ) -> None:
        self.layered, self.layout = layered, layered.layout
        self.num_layers = layered.layout.moe_layers[-1] + 1  # those above route nothing
        self._visit = visit
        self._place_of = {number: index for index, number in enumerate(self.layout.moe_layers)}
        self._watch = RouterWatch(self.layout, type(layered.model).__name__, store, horizons, lookahead_norm)

    def __enter__(self) -> Self:
        self.layered.load_rest()
        self._calls = LayerCalls(self.layered)
        self._visit("", self.layered.model)
        for site in self.layout.sites:
            self.layered.keep([*site.module.modules(), site.block])
        norms: tuple[nn.Module, ...] = ()
        if self._watch.needs_norms:
            self._keep_vectors()
            norms = find_norms(self.layered.model, self.layout, self._look_through)
            if any(tensor.is_meta for norm in norms for tensor in norm.parameters()):
                raise ConfigurationError(
                    "--lookahead_norm next: the normalisations before the routers of "
                    f"{type(self.layered.model).__name__} are more than vectors; use --lookahead_norm own"
                )
        else:
            self._look_through(torch.zeros(1, 2, dtype=torch.long, device=self.layered.device))
        self._watch.attach(norms)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._watch.detach()

    def layers(self, first: int = 0) -> LayersAhead:
        """Return the `num_layers` layers from `first` on, each with its weights until the next one is taken."""
        return LayersAhead(self.layered, range(first, self.num_layers))

    def run(
        self,
        index: int,
        input_ids_BT: torch.Tensor,
        lengths_B: torch.Tensor,
        hidden: torch.Tensor | None = None,
        hidden_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Take one right-padded batch through layer `index`, whose weights are there.

        `hidden` is what the layer before it returned, None before the first; `hidden_BT` marks the tokens whose router
        inputs are kept. Returns hidden states and what the router showed (nothing, for a layer without experts), all in
        host memory. Raises as ResidentTracer does.
        """
        device = self.layered.device
        mask_BT = torch.arange(input_ids_BT.shape[1])[None, :] < lengths_B.cpu()[:, None]
        call = self._calls.of(input_ids_BT.to(device), mask_BT.to(device, torch.long))[index]
        before = call.hidden if hidden is None else hidden.to(device, copy=True)  # a layer may write to it
        with self._watch.watching(hidden_BT) as passes:
            after = self._calls.run(index, before, call)
            if index in self._place_of:
                place = self._place_of[index]
                self._watch.check_complete(passes, range(place, place + 1))
            return after.cpu(), pack(passes[0]) if passes else {}

    def _look_through(self, ids_BT: torch.Tensor) -> None:
        call = self._calls.of(ids_BT, torch.ones_like(ids_BT))
        hidden = call[0].hidden
        count = len(self.layered.layers)
        with LayersAhead(self.layered, range(count)) as layers:
            for index in progress(layers, total=count, description="reading each layer once", unit="layer"):
                self._visit(f"{self.layout.place}.{index}", self.layered.layers[index])
                hidden = self._calls.run(index, hidden, call[index])

    def _keep_vectors(self) -> None:
        """Keep the modules beside the MoE blocks that hold vectors at most, as normalisations do."""
        for site in self.layout.sites:
            layer = self.layered.layers[site.model_layer]
            for child in layer.children():
                if all(tensor.dim() < 2 for tensor in child.parameters()):
                    self.layered.keep(child.modules())
