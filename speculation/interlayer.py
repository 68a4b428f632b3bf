"""InterLayer: a transformer over a token's layers, fed with the routing below and with what earlier tokens chose.

Position l stands for target layer l. Its input is the expert sets of layers l-h, l-h-1, ... (continued, below layer 0,
with the top layers of the token before), what the tokens before chose at layer l (the last one's set and usage decayed
at several rates), and an embedding of layer and horizon; attention is causal over layers. So position l sees what
horizon h allows and no more, all layers of a token are scored in one pass, and tokens are a plain batch dimension; the
cost is O(T * L**2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.errors import ConfigurationError
from speculation.counted import RoutingCounts
from speculation.features import RoutingBatch, decayed_usage, multi_hot, previous_token, weighted_hot
from speculation.neural import NeuralPredictor
from speculation.predictor import MAX_HORIZON, RoutingShape, register

HORIZON_SHARES = (0.6, 0.2, 0.2)  # of training steps; horizon 1 is what most readers ask for


@dataclass(frozen=True)
class InterLayerOptions:
    """Size and regularisation; the defaults were chosen for minutes on a CPU."""

    hidden_size: int = 64
    num_blocks: int = 1
    num_heads: int = 4
    mlp_size: int = 64  # of each layer's own MLP; per-layer weights cost no more time than shared ones and learn more
    reach: int = 6  # layers below that a layer sees directly, beside attention
    dropout: float = 0.05
    weight_dropout: float = 0.3  # share of training tokens shown without routing weights, so that ids alone suffice
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.99)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigurationError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")


@register
class InterLayer(NeuralPredictor):
    """The transformer above as a predictor; one model serves horizons 1 to 3."""

    name = "interlayer"
    uses = frozenset({"weights"})

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if "decays" in options:
            options["decays"] = tuple(options["decays"])
        self.settings = InterLayerOptions(**options)

    def options(self) -> dict[str, Any]:
        return asdict(self.settings)

    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        frequency_LE = None if counts is None else counts.frequency_LE()
        return InterLayerModule(shape, self.settings, generator, frequency_LE)

    def features(self, batch: RoutingBatch) -> tuple[Tensor, ...]:
        """Sets, weight shares, both of the token before (T, L, E), decayed usage (T, L, R, E), weights known (T,)."""
        hot_TLE = multi_hot(batch.expert_ids_TLK, batch.num_experts)
        if batch.routing_weights_TLK is None or "weights" not in self.uses:
            share_TLE, known_T = torch.zeros_like(hot_TLE), hot_TLE.new_zeros(batch.num_tokens)
        else:
            share_TLE = weighted_hot(batch.expert_ids_TLK, batch.routing_weights_TLK, batch.num_experts)
            known_T = hot_TLE.new_ones(batch.num_tokens)
        usage_TLRE = decayed_usage(hot_TLE, batch.offsets, self.settings.decays)
        return (
            hot_TLE,
            share_TLE,
            previous_token(hot_TLE, batch.offsets),
            previous_token(share_TLE, batch.offsets),
            usage_TLRE,
            known_T,
        )

    def logits(self, features: tuple[Tensor, ...], horizon: int, generator: torch.Generator | None) -> Tensor:
        module = self.module_
        assert isinstance(module, InterLayerModule)
        return module(features, horizon, generator)  # type: ignore[no-any-return]

    def loss(self, logits_TLE: Tensor, expert_ids_TLK: Tensor) -> Tensor:
        """Cross-entropy of a softmax over experts against the chosen set, 1/K each."""
        return -F.log_softmax(logits_TLE.float(), dim=-1).gather(2, expert_ids_TLK).mean()

    def sample_horizon(self, generator: torch.Generator) -> int:
        assert self.shape_ is not None
        shares = torch.tensor(HORIZON_SHARES[: min(MAX_HORIZON, self.shape_.num_layers)])
        return int(torch.multinomial(shares, 1, generator=generator)) + 1

    def training_bytes_per_token(self, shape: RoutingShape) -> tuple[int, int]:
        rows = 4 + len(self.settings.decays)
        features = 4 * shape.num_layers * shape.num_experts * (rows + 2)
        options = self.settings
        kept_per_block = 20 * options.hidden_size + 2 * options.mlp_size + 2 * options.num_heads * shape.num_layers
        inputs = 2 * (options.reach + 1 + rows) * shape.num_experts
        working = 4 * shape.num_layers * (options.num_blocks * kept_per_block + inputs + 3 * shape.num_experts)
        return features, working


class InterLayerModule(nn.Module):
    """The network: per-layer tables in and out, blocks of attention over layers and per-layer MLPs between."""

    def __init__(
        self, shape: RoutingShape, settings: InterLayerOptions, generator: torch.Generator, frequency_LE: Tensor | None
    ) -> None:
        super().__init__()
        layers, experts, hidden = shape.num_layers, shape.num_experts, settings.hidden_size
        rates = len(settings.decays)
        self.dropout, self.weight_dropout = settings.dropout, settings.weight_dropout
        self.reach = max(min(settings.reach, layers), min(MAX_HORIZON, layers))
        scale = 0.5 / math.sqrt(shape.top_k)
        self.below_LXD = _table(generator, layers, (self.reach + 1) * experts, hidden, scale=scale)
        self.before_LXD = _table(generator, layers, (2 + rates) * experts, hidden, scale=scale)
        self.place_HLD = _table(generator, min(MAX_HORIZON, layers), layers, hidden, scale=0.1)
        self.blocks = nn.ModuleList(_Block(layers, settings, generator) for _ in range(settings.num_blocks))
        self.norm = nn.RMSNorm(hidden)
        self.head_LDE = _table(generator, layers, hidden, experts, scale=0.02)
        # Each expert's own recent use speaks for it directly; hidden_size may be below E.
        self.recent_LR1 = nn.Parameter(torch.zeros(layers, rates + 1, 1))
        start_LE = torch.zeros(layers, experts) if frequency_LE is None else frequency_LE.clamp_min(1e-4).log()
        self.bias_LE = nn.Parameter(start_LE.clone())

    def forward(self, features: Sequence[Tensor], horizon: int, generator: torch.Generator | None) -> Tensor:
        """Logits (T, L, E)."""
        hot_TLE, share_TLE, before_TLE, before_share_TLE, usage_TLRE, known_T = features
        layers = hot_TLE.shape[1]
        shown_T = known_T
        if generator is not None:
            shown_T = known_T * _keep(known_T.shape, self.weight_dropout, generator, known_T)
        shown_T11 = shown_T[:, None, None]
        share_TLE, before_share_TLE = share_TLE * shown_T11, before_share_TLE * shown_T11
        # Decoding order backwards from layer l: this token's layers below it, then the top layers of the token before.
        path_TPE = torch.cat([before_TLE[:, -self.reach :], hot_TLE], dim=1)
        below = [
            path_TPE[:, self.reach - back : self.reach - back + layers]
            if back >= horizon
            else torch.zeros_like(hot_TLE)
            for back in range(1, self.reach + 1)
        ]
        below.append(torch.cat([before_share_TLE[:, -horizon:], share_TLE[:, :-horizon]], dim=1))
        below_TLD = torch.einsum("tlx,lxd->tld", torch.cat(below, dim=2), self.below_LXD)
        earlier_TLX = torch.cat([before_TLE, before_share_TLE, usage_TLRE.flatten(2)], dim=2)
        before_TLD = torch.einsum("tlx,lxd->tld", earlier_TLX, self.before_LXD)
        hidden_TLD = F.gelu(below_TLD + before_TLD + self.place_HLD[horizon - 1], approximate="tanh")
        for block in self.blocks:
            hidden_TLD = block(hidden_TLD, generator)
        logits_TLE = torch.einsum("tld,lde->tle", self.norm(hidden_TLD), self.head_LDE) + self.bias_LE
        recent_TLRE = torch.cat([before_TLE.unsqueeze(2), usage_TLRE], dim=2)
        return logits_TLE + (recent_TLRE * self.recent_LR1).sum(dim=2)


class _Block(nn.Module):
    """Pre-norm attention over the layers below, then each layer's own GELU MLP."""

    def __init__(self, layers: int, settings: InterLayerOptions, generator: torch.Generator) -> None:
        super().__init__()
        hidden, inner = settings.hidden_size, settings.mlp_size
        self.heads, self.dropout = settings.num_heads, settings.dropout
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = _linear(hidden, 3 * hidden, generator)
        self.out = _linear(hidden, hidden, generator, scale=0.5)
        self.up_LDM = _table(generator, layers, hidden, inner, scale=1 / math.sqrt(hidden))
        self.down_LMD = _table(generator, layers, inner, hidden, scale=0.5 / math.sqrt(inner))

    def forward(self, hidden_TLD: Tensor, generator: torch.Generator | None) -> Tensor:
        tokens, layers, hidden = hidden_TLD.shape
        qkv = self.qkv(self.attention_norm(hidden_TLD)).view(tokens, layers, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (T, heads, L, D / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed_TLD = self.out(mixed.transpose(1, 2).reshape(tokens, layers, hidden))
        hidden_TLD = hidden_TLD + _drop(mixed_TLD, self.dropout, generator)
        inner_TLM = F.gelu(torch.einsum("tld,ldm->tlm", self.mlp_norm(hidden_TLD), self.up_LDM), approximate="tanh")
        mlp_TLD = torch.einsum("tlm,lmd->tld", inner_TLM, self.down_LMD)
        return hidden_TLD + _drop(mlp_TLD, self.dropout, generator)


def _table(generator: torch.Generator, *size: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size, generator=generator) * scale)


def _linear(inputs: int, outputs: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * (scale / math.sqrt(inputs)))
        linear.bias.zero_()
    return linear


def _drop(values: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    if generator is None or share == 0:
        return values
    return values * _keep(values.shape, share, generator, values) / (1 - share)


def _keep(shape: Sequence[int], share: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """1.0 where kept, 0.0 where dropped, drawn from the step's own generator so that a resumed run draws the same."""
    return (torch.rand(shape, generator=generator, device=like.device) >= share).to(like)
