"""Tracing a model that fits in memory whole: its routers are watched while batches run through.

Shapes: B sequences, T positions, t of one pass, N = B*t, K experts per token, E experts, M tokens whose router inputs
are kept, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from transformers import PreTrainedModel

from moe.norms import find_norms
from moe.passes import BatchRouting, gather_passes
from moe.routers import RouterLayout
from moe.watching import LOOKAHEAD_NORMS, RouterWatch

__all__ = ["LOOKAHEAD_NORMS", "ResidentTracer"]


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
        self.model = model
        self.layout = layout
        self._watch = RouterWatch(layout, type(model).__name__, store, horizons, lookahead_norm)

    def __enter__(self) -> Self:
        self._watch.attach(find_norms(self.model, self.layout) if self._watch.needs_norms else ())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._watch.detach()

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
        Raises ConfigurationError where the experts received, the first time, anything else than what was kept. The
        function raises ExpertSpeculationError if a router was not called exactly once in each pass.
        """
        with self._watch.watching(hidden_BT) as passes:

            def gathered(batch_size: int, count: int) -> BatchRouting:
                self._watch.check_complete(passes, range(self.layout.num_layers), count)
                return gather_passes(passes, batch_size, self.layout.num_experts, self._watch.horizons)

            yield gathered
