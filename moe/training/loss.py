"""What a mini-Mixtral is trained on: next-token cross-entropy, balanced experts in every layer, tame router logits."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralForCausalLM

BALANCE_WEIGHT = 0.01
"""Switch Transformers (Fedus et al. 2021, 2101.03961), section 2.2."""

ROUTER_Z_WEIGHT = 1e-3
"""ST-MoE (Zoph et al. 2022, 2202.08906), section 3."""


class Losses(NamedTuple):
    """Scalars: what is minimised, and its language-model part in nats per token."""

    total: Tensor
    language: Tensor


def training_losses(model: MixtralForCausalLM, rows: Tensor, balance_weight: float = BALANCE_WEIGHT) -> Losses:
    """Losses of token rows int64 [B, T + 1].

    transformers' own balancing loss averages over all layers before it compares experts, so that one layer's neglect of
    an expert can hide behind another's preference; here each layer is balanced by itself.
    """
    output = model.model(input_ids=rows[:, :-1], use_cache=False, output_router_logits=True)
    language = _cross_entropy(model.lm_head(output.last_hidden_state), rows[:, 1:])
    top_k = model.config.num_experts_per_tok
    logits_LNE = torch.stack([logits.float() for logits in output.router_logits])
    routing = balance_weight * _balance(logits_LNE, top_k) + ROUTER_Z_WEIGHT * _z(logits_LNE)
    return Losses(language + routing, language)


@torch.no_grad()
def document_losses(model: MixtralForCausalLM, rows: Tensor, lengths: Tensor) -> Tensor:
    """Summed next-token loss in nats of each right-padded row int64 [B, T] of `lengths` tokens; float32 [B]."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")
    inside = torch.arange(1, rows.shape[1])[None, :] < lengths[:, None]
    return (losses * inside.to(losses.device)).sum(dim=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _balance(logits_LNE: Tensor, top_k: int) -> Tensor:
    experts = logits_LNE.shape[-1]
    chosen = logits_LNE.topk(top_k, dim=-1).indices
    share = nn.functional.one_hot(chosen, experts).sum(dim=2).float().mean(dim=1) / top_k
    probability = logits_LNE.softmax(dim=-1).mean(dim=1)
    return experts * (share * probability).sum(dim=-1).mean()


def _z(logits_LNE: Tensor) -> Tensor:
    return logits_LNE.logsumexp(dim=-1).square().mean()
