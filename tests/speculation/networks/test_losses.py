"""Losses against the same formulas in plain Python."""

import math

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch
from speculation.networks.losses import LOSSES, NEED_WEIGHTS, routing_loss

LOGITS = [1.0, 2.0, 0.5, -1.0]
CHOSEN = [2, 0]
WEIGHTS = [0.6, 0.2]


def batch(weights: bool = True) -> RoutingBatch:
    known = torch.tensor([[WEIGHTS]]) if weights else None
    return RoutingBatch(torch.tensor([[CHOSEN]]), known, None, None, None, torch.tensor([0, 1]), 4)


def log_share(expert: int, among: list[int]) -> float:
    """Logarithm of an expert's share of a softmax over some experts."""
    return LOGITS[expert] - math.log(sum(math.exp(LOGITS[each]) for each in among))


EVERYONE, OTHERS = [0, 1, 2, 3], [1, 3]
SET = -(log_share(2, EVERYONE) + log_share(0, EVERYONE)) / 2
SIGNS = [1 if expert in CHOSEN else -1 for expert in EVERYONE]
EXPECTED = {
    "set": SET,
    "membership": sum(math.log1p(math.exp(-sign * x)) for sign, x in zip(SIGNS, LOGITS, strict=True)) / 2,
    "pairwise": -(log_share(2, [2, *OTHERS]) + log_share(0, [0, *OTHERS])) / 2,
    "ranks": -(log_share(2, EVERYONE) + log_share(0, [0, *OTHERS])) / 2,
    "weighted": -(log_share(2, EVERYONE) * (0.25 + 0.5 * 0.75) + log_share(0, EVERYONE) * (0.25 + 0.5 * 0.25)),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_equals_its_formula(name: str) -> None:
    assert float(routing_loss(name, torch.tensor([[LOGITS]]), batch())) == pytest.approx(EXPECTED[name], rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_that_needs_an_order_is_refused_without_weights(name: str) -> None:
    logits = torch.tensor([[LOGITS]])
    if name in NEED_WEIGHTS:
        with pytest.raises(ConfigurationError, match=f"loss {name} needs routing weights"):
            routing_loss(name, logits, batch(weights=False))
    else:
        assert routing_loss(name, logits, batch(weights=False)).isfinite()


def test_the_order_counts_where_weights_tell_it() -> None:
    logits = torch.tensor([[LOGITS]])
    expected = SET - 0.3 * log_share(2, CHOSEN)
    assert float(routing_loss("set", logits, batch(), 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(routing_loss("set", logits, batch(weights=False), 0.3)) == pytest.approx(SET, rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_stay_finite_where_every_expert_is_chosen(name: str) -> None:
    logits = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([[1, 0]]).expand(3, 2, 2)
    whole = RoutingBatch(ids, torch.rand(3, 2, 2), None, None, None, torch.tensor([0, 3]), 2)
    loss = routing_loss(name, logits, whole, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
