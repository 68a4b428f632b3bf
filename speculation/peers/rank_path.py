"""rank_path: one MLP for all layers on the path of experts, by rank, that a token took through the layers below.

The idea is that of speculative-moe (Mario928/speculative-moe, its experiment 4): embeddings of the rank-1 expert of
every layer below, of the last layer's rank-2 expert, its gate probabilities, the layer and the token's position, then
two hidden layers of 512 and a softmax. Published on Mixtral-8x7B, for the rank-1 expert: 55.6 top-1 and 73.2 top-2
with a 98/1/1 split of single tokens, which leaks (neighbouring tokens of a text lie in train and test); 67.0 top-2 on
held-out problems.

Ours embeds all K ranks of the last `reach` layers, normalises by layer instead of by batch (a score must not depend on
what it is packed with), starts its output at the layers' frequencies, and is trained on the whole set with a softmax
against K targets, and a little on which of them came first. It is given more than the original and is split by
sequence, so it stands for the idea at its best; like the original it sees nothing of earlier tokens. Where
`expert_order` is unknown, rank is the stored order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculation.counted import RoutingCounts
from speculation.features import RoutingBatch
from speculation.networks.horizons import draw_horizon
from speculation.networks.layered import drop, table
from speculation.networks.losses import ORDER_SHARE, routing_loss
from speculation.neural import NeuralPredictor
from speculation.predictor import MAX_HORIZON, RoutingShape, register


@dataclass(frozen=True)
class RankPathOptions:
    """Sizes as published where they are known: hidden layers of 512, embeddings of 7 rounded to 8."""

    reach: int = 8
    embedding_size: int = 8
    hidden_size: int = 512
    dropout: float = 0.1
    weight_dropout: float = 0.2  # share of training tokens shown without routing weights, so that ids alone suffice


@register
class RankPath(NeuralPredictor):
    """The MLP above as a predictor; layers without a known layer below get their frequencies."""

    name = "rank_path"
    uses = frozenset({"weights"})

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.settings = RankPathOptions(**options)

    def options(self) -> dict[str, Any]:
        return asdict(self.settings)

    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        return RankPathModule(shape, self.settings, generator, None if counts is None else counts.frequency_LE())

    def logits(self, batch: RoutingBatch, horizon: int, generator: torch.Generator | None) -> Tensor:
        module = self.module_
        assert isinstance(module, RankPathModule)
        shares_TLK = None
        if batch.routing_weights_TLK is not None and "weights" in self.uses:
            weights_TLK = batch.routing_weights_TLK
            shares_TLK = weights_TLK / weights_TLK.sum(dim=2, keepdim=True).clamp_min(1e-6)
        starts_T = torch.repeat_interleave(batch.offsets[:-1], batch.sequence_lengths)
        position_T = torch.arange(batch.num_tokens, device=starts_T.device) - starts_T
        scores: Tensor = module(batch.expert_ids_TLK, shares_TLK, position_T, horizon, generator)
        return scores.float()

    def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
        return routing_loss("set", logits_TLE, batch, ORDER_SHARE)

    def sample_horizon(self, generator: torch.Generator) -> int:
        assert self.shape_ is not None
        return draw_horizon(self.shape_.num_layers, generator)

    def muon_parameters(self, module: nn.Module) -> list[str]:
        return ["first.weight", "second.weight"]

    def training_bytes_per_token(self, shape: RoutingShape) -> int:
        slots = self.settings.reach * shape.top_k
        row = slots * (8 + 3 * self.settings.embedding_size) + 7 * self.settings.hidden_size + 3 * shape.num_experts
        return 4 * shape.num_layers * row


class RankPathModule(nn.Module):
    """Embeddings of (distance, rank, expert), concatenated with layer, weight shares and position, then the MLP."""

    def __init__(
        self, shape: RoutingShape, settings: RankPathOptions, generator: torch.Generator, frequency_LE: Tensor | None
    ) -> None:
        super().__init__()
        self.settings, self.num_experts = settings, shape.num_experts
        layers, experts, hidden = shape.num_layers, shape.num_experts, settings.hidden_size
        slots = settings.reach * shape.top_k
        size = settings.embedding_size
        # Row 0 of each slot stands for a layer that is not there.
        self.experts_XD = table(generator, slots * (experts + 1), size, scale=1.0)
        self.place_HLD = table(generator, min(MAX_HORIZON, layers), layers, 2 * size, scale=1.0)
        inputs = slots * size + 2 * size + shape.top_k + 2
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.head = nn.Linear(hidden, experts, bias=False)
        with torch.no_grad():
            for linear, scale in ((self.first, 1.0), (self.second, 1.0), (self.head, 0.1)):
                inner = linear.weight.shape[1]
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * scale / inner**0.5)
                if linear.bias is not None:
                    linear.bias.zero_()
        start_LE = torch.zeros(layers, experts) if frequency_LE is None else frequency_LE.clamp_min(1e-4).log()
        self.bias_L1E = nn.Parameter(start_LE[:, None].clone())

    def forward(
        self,
        ids_TLK: Tensor,
        shares_TLK: Tensor | None,
        position_T: Tensor,
        horizon: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Logits (T, L, E)."""
        ids_LTK = ids_TLK.transpose(0, 1)
        layers, tokens, top_k = ids_LTK.shape
        slots = torch.arange(self.settings.reach * top_k, device=ids_LTK.device) * (self.num_experts + 1)
        path_LTS = torch.cat([_below(ids_LTK + 1, horizon + step) for step in range(self.settings.reach)], dim=2)
        path_LTX = F.embedding(path_LTS + slots, self.experts_XD).flatten(2)
        share_LTX = path_LTX.new_zeros(layers, tokens, top_k + 1)
        if shares_TLK is not None:
            # Beside the shares, whether they are known.
            share_LTX = _below(F.pad(shares_TLK.transpose(0, 1), (0, 1), value=1.0), horizon)
            if generator is not None:
                drawn_T1 = torch.rand(tokens, 1, generator=generator, device=share_LTX.device)
                share_LTX = share_LTX * (drawn_T1 >= self.settings.weight_dropout)
        depth_LT1 = (position_T.float().log1p() / 8)[:, None].expand(layers, -1, -1)  # about 1 at 3,000 tokens
        place_LTX = self.place_HLD[horizon - 1][:, None].expand(-1, tokens, -1)
        hidden_LTD = torch.cat([path_LTX, place_LTX, share_LTX, depth_LT1], dim=2)
        for linear, norm in zip((self.first, self.second), self.norms, strict=True):
            hidden_LTD = drop(F.leaky_relu(norm(linear(hidden_LTD))), self.settings.dropout, generator)
        scores: Tensor = self.head(hidden_LTD) + self.bias_L1E
        return scores.transpose(0, 1)


def _below(values_LTK: Tensor, back: int) -> Tensor:
    """The same token's values `back` layers below, zeros where there is no such layer."""
    return F.pad(values_LTK, (0, 0, 0, 0, back, 0))[: len(values_LTK)]
