"""token_transformer: a causal transformer over token ids; a layer's embedding asks it for that layer's experts.

The idea is that of MoE-Beyond (2508.17137): predict experts as a multi-label problem from the embeddings of the tokens
so far and of the layer, without seeing any routing. Published for DeepSeek-V2-Lite on unseen prompts, trained on 66
million activations: accuracy 97.5 % and F1 86.6 %. Accuracy there counts every expert of every layer, most of them
rightly left out: naming none at all has 1 - 6/64 = 90.6 %. Recall at K is the nearest of our figures to its F1.

Ours learns its token embeddings (hashed to buckets; imports without ids hash token strings) where the original has the
model's own, runs the transformer once per token and asks all layers at once, lets each layer have its own output,
penalises distance instead of adding positions, and starts at the layers' frequencies. The loss is the original's:
binary cross-entropy per expert. It is trained on the traces at hand, as all its rivals here are; beside the original's
data that is little, so it may fall short of it where token ids are many.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.errors import ConfigurationError
from speculation.counted import RoutingCounts
from speculation.features import RoutingBatch, bucketed, previous_token
from speculation.networks.horizons import draw_horizon
from speculation.networks.layered import drop, gelu, table, working_dtype
from speculation.networks.losses import membership
from speculation.networks.token_context import TokenContext
from speculation.neural import NeuralPredictor
from speculation.predictor import RoutingShape, register


@dataclass(frozen=True)
class TokenTransformerOptions:
    """Size and regularisation; the defaults were chosen for minutes on a CPU."""

    buckets: int = 16384
    hidden_size: int = 128
    num_blocks: int = 2
    num_heads: int = 4
    window: int = 512  # tokens that attention reaches back
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigurationError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")


@register
class TokenTransformer(NeuralPredictor):
    """The transformer above as a predictor; layers that are scored before the token is known go by the one before."""

    name = "token_transformer"
    score_scale = "log_odds"
    requires = frozenset({"ids", "tokens"})
    longest_piece = 512

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.settings = TokenTransformerOptions(**options)

    def options(self) -> dict[str, Any]:
        return asdict(self.settings)

    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        frequency_LE = None if counts is None else counts.frequency_LE()
        return TokenTransformerModule(shape, self.settings, generator, frequency_LE)

    def logits(self, batch: RoutingBatch, horizon: int, generator: torch.Generator | None) -> Tensor:
        module = self.module_
        assert isinstance(module, TokenTransformerModule)
        if batch.token_ids_T is None:
            raise ConfigurationError(
                "token_transformer: these sequences were read without tokens; read them with "
                "sequences(..., columns=('tokens',)), or collect traces that hold token ids or strings"
            )
        scores: Tensor = module(batch.token_ids_T, batch.offsets, horizon, generator)
        return scores.float()

    def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
        return membership(logits_TLE.float(), batch)

    def sample_horizon(self, generator: torch.Generator) -> int:
        assert self.shape_ is not None
        return draw_horizon(self.shape_.num_layers, generator)

    def muon_parameters(self, module: nn.Module) -> list[str]:
        context = [name for name, each in module.named_parameters() if name.startswith("context.") and each.dim() == 2]
        return [*context, "ask_DD", "head_LDE"]

    def training_bytes_per_token(self, shape: RoutingShape) -> int:
        settings, hidden = self.settings, self.settings.hidden_size
        block = 24 * hidden + 2 * settings.num_heads * settings.window
        return 4 * (settings.num_blocks * block + shape.num_layers * (6 * hidden + 4 * shape.num_experts))


class TokenTransformerModule(nn.Module):
    """Hashed token embeddings, blocks of causal attention, and for each layer a question and an output matrix."""

    def __init__(
        self,
        shape: RoutingShape,
        settings: TokenTransformerOptions,
        generator: torch.Generator,
        frequency_LE: Tensor | None,
    ) -> None:
        super().__init__()
        self.settings = settings
        layers, experts, hidden = shape.num_layers, shape.num_experts, settings.hidden_size
        self.tokens_VD = table(generator, settings.buckets, hidden, scale=1.0)
        self.context = TokenContext(
            hidden, settings.num_blocks, settings.num_heads, settings.window, settings.dropout, generator
        )
        self.ask_DD = table(generator, hidden, hidden, scale=1 / math.sqrt(hidden))
        # One question per layer where the token is known, one where only those before it are.
        self.place_2L1D = table(generator, 2, layers, 1, hidden, scale=0.5)
        self.head_LDE = table(generator, layers, hidden, experts, scale=0.1 / math.sqrt(hidden))
        # A sigmoid of this gives each expert its frequency.
        start_LE = torch.full((layers, experts), 1 / experts) if frequency_LE is None else frequency_LE
        self.bias_L1E = nn.Parameter(torch.logit((shape.top_k * start_LE).clamp(1e-4, 1 - 1e-4))[:, None])

    def forward(self, token_ids_T: Tensor, offsets: Tensor, horizon: int, generator: torch.Generator | None) -> Tensor:
        """Logits (T, L, E)."""
        noise, dtype = self.settings.dropout, working_dtype(token_ids_T.device)
        tokens_TD = F.embedding(bucketed(token_ids_T, self.settings.buckets), self.tokens_VD).to(dtype)
        known_TD = self.context(drop(tokens_TD, noise, generator), offsets.tolist(), generator)
        asked_TD = known_TD @ self.ask_DD.to(dtype)
        place_2L1D = self.place_2L1D.to(dtype)
        before_LTD = previous_token(asked_TD, offsets) + place_2L1D[1, :horizon]
        now_LTD = asked_TD + place_2L1D[0, horizon:]
        hidden_LTD = drop(gelu(torch.cat([before_LTD, now_LTD])), noise, generator)
        scores_LTE: Tensor = torch.bmm(hidden_LTD, self.head_LDE.to(dtype)) + self.bias_L1E
        return scores_LTE.transpose(0, 1)
