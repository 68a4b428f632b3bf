"""A sequence while it is being decoded: what its routers chose so far, one layer at a time.

    state = predictor.start()
    for each token:  state.begin_token(token_id)
        for each layer:  scores_E = predictor.predict_next(state, horizon=1)
                         state.observe(expert_ids_K, routing_weights_K)

This class keeps the record and can pack it into a RoutingBatch, which is all a predictor needs to be right; predictors
that are also fast return a subclass from `start` that keeps their own running sums beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from speculation.features import RoutingBatch

if TYPE_CHECKING:
    from speculation.predictor import RoutingShape


class LiveState:
    """The routing of one sequence so far; step t*L + l is the choice at token t, layer l."""

    def __init__(self, shape: RoutingShape) -> None:
        self.shape = shape
        self.token_ids: list[int | None] = []
        self.expert_ids: list[Tensor] = []  # (K,) int64 for each step observed
        self.routing_weights: list[Tensor] = []  # (K,) for each step; empty where weights are not known
        self.lookahead_logits: list[Tensor] = []  # (H, E) for each step; empty where they are not known

    @property
    def num_steps(self) -> int:
        """Steps observed."""
        return len(self.expert_ids)

    def target(self, horizon: int) -> tuple[int, int]:
        """Token and layer of the step `horizon` after the last observed one."""
        return divmod(self.num_steps - 1 + horizon, self.shape.num_layers)

    def begin_token(self, token_id: int | None = None) -> None:
        """Says that a token goes through the layers now; raises ValueError before the last one went through all."""
        if self.num_steps != len(self.token_ids) * self.shape.num_layers:
            raise ValueError(
                f"token {len(self.token_ids) - 1} was observed at {self.num_steps % self.shape.num_layers} of "
                f"{self.shape.num_layers} layers; observe the rest before the next token begins"
            )
        self.token_ids.append(token_id)

    def observe(
        self,
        expert_ids_K: Sequence[int] | Tensor,
        routing_weights_K: Sequence[float] | Tensor | None = None,
        lookahead_logits_HE: Tensor | None = None,
    ) -> None:
        """Takes the choice at the next layer: distinct experts, by falling weight where weights are given.

        `lookahead_logits_HE` are the routers of the layers 1 to H above on this layer's input. Raises ValueError for a
        token that did not begin, a wrong number of experts, or weights that are given at some layers only.
        """
        steps = self.num_steps
        if steps >= len(self.token_ids) * self.shape.num_layers:
            raise ValueError("all layers of the last token were observed; call begin_token first")
        ids_K = torch.as_tensor(expert_ids_K, dtype=torch.int64, device="cpu")
        if ids_K.shape != (self.shape.top_k,):
            raise ValueError(f"expert ids of shape {tuple(ids_K.shape)}, wanted ({self.shape.top_k},)")
        given = [(routing_weights_K, self.routing_weights), (lookahead_logits_HE, self.lookahead_logits)]
        for name, (values, record) in zip(("routing weights", "lookahead logits"), given, strict=True):
            if steps and (values is None) == bool(record):
                raise ValueError(f"{name} must be given at every layer or at none")
        self.expert_ids.append(ids_K)
        for values, record in given:
            if values is not None:
                record.append(torch.as_tensor(values, dtype=torch.float32, device="cpu"))
        self._observed()

    def _observed(self) -> None:
        """Called when a choice has joined the record; fast states take it into their sums here."""

    def last(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Expert ids, routing weights and lookahead logits of the step observed last, None where they are not known."""
        weights_K = self.routing_weights[-1] if self.routing_weights else None
        return self.expert_ids[-1], weights_K, self.lookahead_logits[-1] if self.lookahead_logits else None

    def as_batch(self, num_tokens: int) -> RoutingBatch:
        """The record as a batch of `num_tokens` rows; what is not known yet holds the first K experts and zeros."""
        layers, experts, top_k = self.shape.num_layers, self.shape.num_experts, self.shape.top_k
        steps = num_tokens * layers
        ids_XK = torch.arange(top_k).repeat(steps, 1)
        weights_XK = torch.zeros(steps, top_k) if self.routing_weights or not self.num_steps else None
        if self.num_steps:
            ids_XK[: self.num_steps] = torch.stack(self.expert_ids)
        if self.routing_weights and weights_XK is not None:
            weights_XK[: self.num_steps] = torch.stack(self.routing_weights)
        lookahead_THLE = None
        if self.lookahead_logits or not self.num_steps:
            horizons = len(self.lookahead_logits[0]) if self.lookahead_logits else layers
            lookahead_THLE = torch.zeros(num_tokens, horizons, layers, experts)
            for step, logits_HE in enumerate(self.lookahead_logits):
                token, layer = divmod(step, layers)
                for above in range(1, min(horizons, layers - 1 - layer) + 1):
                    lookahead_THLE[token, above - 1, layer + above] = logits_HE[above - 1]
        known = [token_id for token_id in self.token_ids if token_id is not None]
        token_ids_T = None
        if len(known) == len(self.token_ids):
            token_ids_T = torch.tensor([*known, *([0] * (num_tokens - len(known)))])
        return RoutingBatch(
            expert_ids_TLK=ids_XK.view(num_tokens, layers, top_k),
            routing_weights_TLK=None if weights_XK is None else weights_XK.view(num_tokens, layers, top_k),
            router_logits_TLE=None,
            lookahead_logits_THLE=lookahead_THLE,
            token_ids_T=token_ids_T,
            offsets=torch.tensor([0, num_tokens]),
            num_experts=experts,
        )
