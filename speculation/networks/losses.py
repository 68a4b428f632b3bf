"""Losses of scores against a chosen set: as a set, as an order, or as both.

Shapes: logits (T, L, E); `expert_ids_TLK` the chosen set, by falling weight where an order is asked for; weights
(T, L, K). Every loss is a mean over tokens and layers, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwork.errors import ConfigurationError
from speculation.features import RoutingBatch


def set_softmax(logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """Cross-entropy of a softmax over experts against the set, 1/K each."""
    return -F.log_softmax(logits_TLE, dim=-1).gather(2, batch.expert_ids_TLK).mean()


def membership(logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """Binary cross-entropy of each expert's membership, summed over experts and divided by K."""
    target_TLE = torch.zeros_like(logits_TLE).scatter_(2, batch.expert_ids_TLK, 1.0)
    total = F.binary_cross_entropy_with_logits(logits_TLE, target_TLE, reduction="sum")
    return total / batch.expert_ids_TLK.numel()


def pairwise(logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """Each chosen expert against all that were not chosen: softplus of their logsumexp minus its logit."""
    others_TLE = logits_TLE.scatter(2, batch.expert_ids_TLK, -torch.inf)
    rivals_TL1 = torch.logsumexp(others_TLE, dim=2, keepdim=True)
    return F.softplus(rivals_TL1 - logits_TLE.gather(2, batch.expert_ids_TLK)).mean()


def ranks(logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """Plackett-Luce: the first choice among all, the second among the rest, and so on (Plackett 1975)."""
    chosen_TLK = logits_TLE.gather(2, batch.expert_ids_TLK)
    others_TLE = logits_TLE.scatter(2, batch.expert_ids_TLK, -torch.inf)
    rivals_TL1 = torch.logsumexp(others_TLE, dim=2, keepdim=True)
    # The candidates for place k are the experts of place k and later, and those never chosen.
    later_TLK = chosen_TLK.flip(2).logcumsumexp(dim=2).flip(2)
    return (torch.logaddexp(later_TLK, rivals_TL1) - chosen_TLK).mean()


def weighted(logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """Cross-entropy against half the set, 1/K each, and half the experts' shares of the routing weight."""
    assert batch.routing_weights_TLK is not None
    share_TLK = batch.routing_weights_TLK / batch.routing_weights_TLK.sum(dim=2, keepdim=True).clamp_min(1e-6)
    target_TLK = 0.5 / batch.expert_ids_TLK.shape[2] + 0.5 * share_TLK
    return -(F.log_softmax(logits_TLE, dim=-1).gather(2, batch.expert_ids_TLK) * target_TLK).sum(dim=2).mean()


def first_choice(logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """Cross-entropy of the router's first choice against the rest of the set.

    It compares chosen experts with each other only, so that a little of it orders a set that another loss finds.
    """
    return -F.log_softmax(logits_TLE.gather(2, batch.expert_ids_TLK), dim=2)[:, :, 0].mean()


ORDER_SHARE = 0.1  # of `first_choice` beside another loss: the first choice is found far more often, sets as often

LOSSES: dict[str, Callable[[Tensor, RoutingBatch], Tensor]] = {
    "set": set_softmax,
    "membership": membership,
    "pairwise": pairwise,
    "ranks": ranks,
    "weighted": weighted,
}
NEED_WEIGHTS = frozenset({"ranks", "weighted"})  # weights, or the order that only weights give


def check_loss(name: str) -> None:
    """Raises ConfigurationError for an unknown loss."""
    if name not in LOSSES:
        raise ConfigurationError(f"loss {name}: unknown; choose one of {', '.join(LOSSES)}")


def routing_loss(name: str, logits_TLE: Tensor, batch: RoutingBatch, order_share: float = 0.0) -> Tensor:
    """The named loss, and `order_share` of `first_choice` where weights tell which expert came first.

    Raises ConfigurationError where the named loss itself needs routing weights that the batch lacks.
    """
    known = batch.routing_weights_TLK is not None
    if name in NEED_WEIGHTS and not known:
        raise ConfigurationError(
            f"loss {name} needs routing weights (the order of the experts follows from them), which these traces lack; "
            "collect them again with --store weights or choose loss set, membership or pairwise"
        )
    logits_TLE = logits_TLE.float()
    loss = LOSSES[name](logits_TLE, batch)
    return loss + order_share * first_choice(logits_TLE, batch) if known and order_share else loss


def scale_of(name: str) -> Literal["logits", "log_odds"]:
    """What scores trained with a loss mean: log-odds of being in the set, or logits that only compare experts."""
    return "log_odds" if name == "membership" else "logits"


def scores_of_frequency(name: str, frequency_LE: Tensor, top_k: int) -> Tensor:
    """The scores (L, E) that fit shares of a layer's choices best under a loss, where nothing else is known."""
    if scale_of(name) == "log_odds":
        return (frequency_LE * top_k).clamp(1e-4, 1 - 1e-4).logit()
    return frequency_LE.clamp_min(1e-4).log()
