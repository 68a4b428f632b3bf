"""What live predictions cost: a sequence is decoded, `predict_next` before each choice and `observe` after it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from speculation.features import RoutingBatch
from speculation.predictor import Predictor

WARM_UP = 0.1  # share of the tokens that is not timed


def decode_timed(
    predictor: Predictor, batch: RoutingBatch, horizon: int = 1, context: int = 0, most_s: float = float("inf")
) -> tuple[list[float], list[float]]:
    """Microseconds of every prediction and every observation, layer by layer, of the one sequence in `batch`.

    Before it, `context` of its own tokens are observed, over and over; decoding stops after the token that ends
    `most_s` seconds.
    """
    state = predictor.start()
    predict, observe = [], []
    began = time.perf_counter()
    for place in range(-context, batch.num_tokens):
        token = place % batch.num_tokens
        state.begin_token(None if batch.token_ids_T is None else int(batch.token_ids_T[token]))
        for layer in range(batch.num_layers):
            weights_K = None if batch.routing_weights_TLK is None else batch.routing_weights_TLK[token, layer]
            lookahead_HE = _lookahead(batch, token, layer)
            started = time.perf_counter()
            if place >= 0:
                predictor.predict_next(state, horizon)
            between = time.perf_counter()
            state.observe(batch.expert_ids_TLK[token, layer], weights_K, lookahead_HE)
            ended = time.perf_counter()
            if place >= WARM_UP * batch.num_tokens or place == batch.num_tokens - 1:
                predict.append((between - started) * 1e6)
                observe.append((ended - between) * 1e6)
        if predict and ended - began > most_s:
            break
    return predict, observe


def _lookahead(batch: RoutingBatch, token: int, layer: int) -> Tensor | None:
    """The logits of the layers above on this layer's input, (H, E); zeros where there is no such layer."""
    logits_THLE = batch.lookahead_logits_THLE
    if logits_THLE is None:
        return None
    found_HE = torch.zeros(logits_THLE.shape[1], batch.num_experts)
    for above in range(1, min(len(found_HE), batch.num_layers - 1 - layer) + 1):
        found_HE[above - 1] = logits_THLE[token, above - 1, layer + above]
    return found_HE
