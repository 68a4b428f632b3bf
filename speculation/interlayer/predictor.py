"""InterLayer: experts from the routing of the layers below and of all earlier tokens; one model for horizons 1 to 3.

The network is in network.py; here are its options, and how it is trained and scored. It requires expert ids,
uses routing weights where traces have them (and is trained with some sequences' weights hidden, so that ids alone
suffice), and with `tokens` uses token ids too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundwork.errors import ConfigurationError
from speculation.counted import RoutingCounts
from speculation.features import RoutingBatch
from speculation.interlayer.live import InterLayerLive
from speculation.interlayer.network import InterLayerNetwork
from speculation.live import LiveState
from speculation.networks.losses import (
    NEED_WEIGHTS,
    ORDER_SHARE,
    check_loss,
    routing_loss,
    scale_of,
    scores_of_frequency,
)
from speculation.neural import NeuralPredictor
from speculation.predictor import MAX_HORIZON, RoutingShape, register

LONGEST_PIECE = 640  # tokens of a sequence that training sees at once; longer context is used in scoring only


@dataclass(frozen=True)
class InterLayerOptions:
    """Size, parts and regularisation; docs/predictors.md has the ablation that each default comes from."""

    hidden_size: int = 128
    mlp_size: int = 160  # of each layer's own MLP
    reach: int = 4  # layers below that a layer sees directly
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.99)  # of the averages over earlier tokens' sets
    copy_heads: int = 4  # 0: no copy attention
    copy_key_size: int = 32
    context_size: int = 128  # width of the transformer over earlier tokens; 0: none
    context_blocks: int = 2
    context_heads: int = 4
    path_size: int = 64  # width of the sum over all layers below; 0: none
    window: int = 1024  # tokens that attention reaches back
    weights: bool = True
    tokens: bool = False
    token_buckets: int = 8192
    token_size: int = 64
    loss: str = "membership"
    order_share: float = ORDER_SHARE  # of the loss that puts the first choice first, where weights tell it
    dropout: float = 0.15
    weight_dropout: float = 0.3  # share of training sequences shown without routing weights
    token_dropout: float = 0.1  # share of training tokens shown without their id
    first_horizon_share: float = 0.6  # of training steps are for horizon 1, the others share the rest

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.loss in NEED_WEIGHTS and not self.weights:
            raise ConfigurationError(f"loss {self.loss} needs routing weights, but option weights is off")
        for name in ("hidden_size", "mlp_size", "reach", "window", "context_heads", "token_buckets", "token_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.context_size % self.context_heads:
            raise ConfigurationError(
                f"context_size {self.context_size} is no multiple of context_heads {self.context_heads}"
            )


@register
class InterLayer(NeuralPredictor):
    """The network above as a predictor."""

    name = "interlayer"
    uses = frozenset({"weights"})

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if "decays" in options:
            options["decays"] = tuple(options["decays"])
        self.settings = InterLayerOptions(**options)
        self.score_scale = scale_of(self.settings.loss)
        self.longest_piece = min(LONGEST_PIECE, self.settings.window)
        self.uses = frozenset(column for column in ("weights", "tokens") if getattr(self.settings, column))

    def options(self) -> dict[str, Any]:
        return asdict(self.settings)

    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        if counts is None:
            frequency_LE = torch.full((shape.num_layers, shape.num_experts), 1 / shape.num_experts)
        else:
            frequency_LE = counts.frequency_LE()
        bias_LE = scores_of_frequency(self.settings.loss, frequency_LE, shape.top_k)
        return InterLayerNetwork(shape, self.settings, self.uses, generator, bias_LE)

    def logits(self, batch: RoutingBatch, horizon: int, generator: torch.Generator | None) -> Tensor:
        return self.network(batch, horizon, generator)  # type: ignore[no-any-return]

    def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
        return routing_loss(self.settings.loss, logits_TLE, batch, self.settings.order_share)

    def sample_horizon(self, generator: torch.Generator) -> int:
        assert self.shape_ is not None
        others = min(MAX_HORIZON, self.shape_.num_layers) - 1
        first = self.settings.first_horizon_share
        if others == 0 or float(torch.rand((), generator=generator)) < first:
            return 1
        return 2 + int(torch.randint(others, (), generator=generator))

    def muon_parameters(self, module: nn.Module) -> list[str]:
        assert isinstance(module, InterLayerNetwork)
        return module.matrices()

    def training_bytes_per_token(self, shape: RoutingShape) -> int:
        """About twice what the backward pass is found to need kept in float32; the rest is room for its temporaries."""
        settings, experts = self.settings, shape.num_experts
        rates, heads = len(settings.decays), settings.copy_heads
        attended = 2 * heads * min(settings.window, LONGEST_PIECE)  # shares of attention, before and after softmax
        inputs = (2 * settings.reach + 4 * rates + 12 + 4 * heads) * experts
        inner = 24 * settings.hidden_size + 4 * settings.mlp_size + 6 * heads * settings.copy_key_size
        context = settings.context_blocks * (24 * settings.context_size + 2 * settings.context_heads * LONGEST_PIECE)
        return 4 * (shape.num_layers * (attended + inputs + inner) + context)

    @property
    def network(self) -> InterLayerNetwork:
        """The fitted network; raises ValueError where there is none."""
        if not isinstance(self.module_, InterLayerNetwork):
            raise ValueError(f"{self.name} has not been fitted")
        return self.module_

    def start(self) -> LiveState:
        assert self.shape_ is not None
        return InterLayerLive(self.shape_, self.network.eval())

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        assert isinstance(state, InterLayerLive)
        return state.scores(horizon)
