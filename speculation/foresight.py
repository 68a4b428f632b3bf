"""foresight: the lookahead logits, corrected by a small network that also sees the routing so far and the token.

The router of layer l, asked h layers early, reads the hidden state itself, which no predictor from routing alone does;
but it is asked about a state that the layers in between still change, and their routing tells much of that change. So
the scores are the lookahead logits, scaled, plus a correction from: these logits, the experts of the layers below,
those of the token before at this layer, their use decayed over earlier tokens, and the token's id. The correction
starts at zero, so that an untrained foresight ranks as gate_lookahead does. Layers below the horizon, for which there
are no lookahead logits yet, are scored from routing and earlier tokens alone, starting at their frequencies.

Nearest published: linear heads on earlier hidden states, 93-98 (2511.10676), and gates fed with earlier inputs (see
speculation.lookahead); those need the hidden states at run time, this one only E numbers a layer.
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
from speculation.features import RoutingBatch, bucketed, decayed_usage, multi_hot
from speculation.networks.horizons import draw_horizon
from speculation.networks.layered import drop, gelu, table, token_before, unit, working_dtype
from speculation.networks.losses import check_loss, routing_loss, scale_of, scores_of_frequency
from speculation.neural import NeuralPredictor
from speculation.predictor import MAX_HORIZON, RoutingShape, register


@dataclass(frozen=True)
class ForesightOptions:
    """Size and regularisation; the defaults were chosen for minutes on a CPU."""

    hidden_size: int = 128
    mlp_size: int = 256  # of each layer's own MLP
    reach: int = 6  # steps before that a layer sees directly
    buckets: int = 4096  # of hashed token ids
    token_dropout: float = 0.1  # share of training tokens shown without their id, so that traces without ids do
    dropout: float = 0.1
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.99)
    loss: str = "membership"  # than "set" more recall and first choices, after 500 and 3,600 steps
    order_share: float = 0.3  # the lookahead logits know the first choice best; less forgets it, more costs recall

    def __post_init__(self) -> None:
        check_loss(self.loss)


@register
class Foresight(NeuralPredictor):
    """The corrected lookahead logits as a predictor, for the horizons that the traces hold such logits of."""

    name = "foresight"
    requires = frozenset({"ids", "lookahead"})
    uses = frozenset({"tokens"})
    learns_from = frozenset({"weights"})
    longest_piece = 640

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if "decays" in options:
            options["decays"] = tuple(options["decays"])
        self.settings = ForesightOptions(**options)
        self.score_scale = scale_of(self.settings.loss)

    def options(self) -> dict[str, Any]:
        return asdict(self.settings)

    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        frequency_LE = None if counts is None else counts.frequency_LE()
        return ForesightModule(shape, self.settings, generator, frequency_LE)

    def logits(self, batch: RoutingBatch, horizon: int, generator: torch.Generator | None) -> Tensor:
        module = self.module_
        assert isinstance(module, ForesightModule)
        lookahead_THLE = batch.lookahead_logits_THLE
        if lookahead_THLE is None:
            raise ConfigurationError(
                "foresight: these sequences were read without lookahead logits; "
                "read them with sequences(..., columns=('lookahead', 'tokens'))"
            )
        if generator is not None:
            horizon = min(horizon, lookahead_THLE.shape[1])  # train for the horizons there are
        if lookahead_THLE.shape[1] < horizon:
            raise ConfigurationError(
                f"--horizon {horizon}: the traces hold lookahead logits of {lookahead_THLE.shape[1]} horizons; "
                f"collect them again with --store weights,lookahead --lookahead {horizon}"
            )
        token_ids_T = batch.token_ids_T if "tokens" in self.uses else None
        scores: Tensor = module(batch, lookahead_THLE[:, horizon - 1].transpose(0, 1), token_ids_T, horizon, generator)
        return scores.float()

    def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
        return routing_loss(self.settings.loss, logits_TLE, batch, self.settings.order_share)

    def sample_horizon(self, generator: torch.Generator) -> int:
        assert self.shape_ is not None
        return draw_horizon(self.shape_.num_layers, generator)

    def muon_parameters(self, module: nn.Module) -> list[str]:
        return ["seen_LXD", "token_LDD", "up_LDM", "down_LMD", "head_LDE"]

    def training_bytes_per_token(self, shape: RoutingShape) -> int:
        options = self.settings
        inputs = (2 * options.reach + 3 * len(options.decays) + 12) * shape.num_experts
        return 4 * shape.num_layers * (inputs + 10 * options.hidden_size + 4 * options.mlp_size)


class ForesightModule(nn.Module):
    """Per-layer tables over everything seen, a per-layer MLP, and a head whose output is added to the lookahead."""

    def __init__(
        self, shape: RoutingShape, settings: ForesightOptions, generator: torch.Generator, frequency_LE: Tensor | None
    ) -> None:
        super().__init__()
        self.settings = settings
        layers, experts, hidden = shape.num_layers, shape.num_experts, settings.hidden_size
        self.low = min(MAX_HORIZON, layers)
        # Not below the largest horizon, so that some step is always known.
        self.reach = max(self.low, min(settings.reach, layers))
        rates = len(settings.decays)
        self.seen_LXD = table(
            generator, layers, (self.reach + rates + 2) * experts, hidden, scale=0.5 / math.sqrt(shape.top_k)
        )
        self.place_HL1D = table(generator, self.low, layers, 1, hidden, scale=0.1)
        self.tokens_VD = table(generator, 1 + settings.buckets, hidden, scale=0.3)  # row 0: not known
        self.token_LDD = table(generator, layers, hidden, hidden, scale=1 / math.sqrt(hidden))
        self.up_LDM = table(generator, layers, hidden, settings.mlp_size, scale=1 / math.sqrt(hidden))
        self.down_LMD = table(generator, layers, settings.mlp_size, hidden, scale=0.5 / math.sqrt(settings.mlp_size))
        self.head_LDE = nn.Parameter(torch.zeros(layers, hidden, experts))
        self.recent_LR1 = nn.Parameter(torch.zeros(layers, 1 + rates, 1))
        self.scale_HL11 = nn.Parameter(torch.ones(self.low, layers, 1, 1))
        # The same for all experts, so that it is the lookahead that ranks them.
        even_LE = torch.full((layers, experts), 1 / experts)
        self.bias_L1E = nn.Parameter(scores_of_frequency(settings.loss, even_LE, shape.top_k)[:, None])
        start_LE = even_LE if frequency_LE is None else frequency_LE
        start_LE = scores_of_frequency(settings.loss, start_LE, shape.top_k)
        self.bias_below_P1E = nn.Parameter(start_LE[: self.low, None].clone())

    def forward(
        self,
        batch: RoutingBatch,
        lookahead_LTE: Tensor,
        token_ids_T: Tensor | None,
        horizon: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Logits (T, L, E)."""
        hot_TLE = multi_hot(batch.expert_ids_TLK, batch.num_experts)
        dtype, starts_S = working_dtype(hot_TLE.device), batch.offsets[:-1]
        usage_LTX = decayed_usage(hot_TLE, batch.offsets, self.settings.decays).flatten(2).transpose(0, 1).to(dtype)
        hot_LTE = hot_TLE.transpose(0, 1).to(dtype)
        before_LTE = token_before(hot_LTE, starts_S)
        ahead_LTE = _standard(lookahead_LTE, horizon)
        seen = [*self._path(hot_LTE, before_LTE, horizon), before_LTE, usage_LTX, ahead_LTE.to(dtype)]
        hidden_LTD = torch.bmm(torch.cat(seen, dim=2), self.seen_LXD.to(dtype)) + self.place_HL1D[horizon - 1].to(dtype)
        token_LTD = self._tokens(token_ids_T, len(hot_TLE), starts_S, horizon, generator).to(dtype)
        hidden_LTD = gelu(hidden_LTD + torch.bmm(token_LTD, self.token_LDD.to(dtype)))
        inner_LTM = gelu(torch.bmm(unit(hidden_LTD), self.up_LDM.to(dtype)))
        noise = self.settings.dropout
        hidden_LTD = hidden_LTD + drop(torch.bmm(inner_LTM, self.down_LMD.to(dtype)), noise, generator)
        correction_LTE = torch.bmm(drop(unit(hidden_LTD), noise, generator), self.head_LDE.to(dtype)).float()
        recent_LTRE = torch.cat([before_LTE, usage_LTX], dim=2).unflatten(2, (-1, batch.num_experts))
        correction_LTE = correction_LTE + (recent_LTRE * self.recent_LR1[:, None].to(dtype)).sum(dim=2)
        bias_L1E = torch.cat([self.bias_below_P1E[:horizon], self.bias_L1E[horizon:]])
        scores_LTE: Tensor = ahead_LTE * self.scale_HL11[horizon - 1] + correction_LTE + bias_L1E
        return scores_LTE.transpose(0, 1)

    def _path(self, hot_LTE: Tensor, before_LTE: Tensor, horizon: int) -> list[Tensor]:
        """The sets 1 to `reach` steps before in decoding order, zeros for those nearer than the horizon."""
        layers = len(hot_LTE)
        steps_XTE = torch.cat([before_LTE[layers - self.reach :], hot_LTE])
        return [
            steps_XTE[self.reach - back :][:layers] if back >= horizon else torch.zeros_like(hot_LTE)
            for back in range(1, self.reach + 1)
        ]

    def _tokens(
        self,
        token_ids_T: Tensor | None,
        tokens: int,
        starts_S: Tensor,
        horizon: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Each layer's token embedding (L, T, D): the token's own where it is known by then, else the one before's."""
        layers = len(self.token_LDD)
        rows_T = starts_S.new_zeros(tokens)
        if token_ids_T is not None:
            rows_T = 1 + bucketed(token_ids_T, self.settings.buckets)
        if generator is not None:
            shown_T = torch.rand(tokens, generator=generator, device=rows_T.device) >= self.settings.token_dropout
            rows_T = torch.where(shown_T, rows_T, 0)
        own_TD = F.embedding(rows_T, self.tokens_VD)
        before_TD = token_before(own_TD, starts_S)
        return torch.cat([before_TD.expand(horizon, -1, -1), own_TD.expand(layers - horizon, -1, -1)])


def _standard(lookahead_LTE: Tensor, horizon: int) -> Tensor:
    """Each layer's logits less their mean over experts, over their own spread; 0 for layers below the horizon."""
    centred_LTE = lookahead_LTE - lookahead_LTE.mean(dim=2, keepdim=True)
    standard_LTE = centred_LTE / centred_LTE.pow(2).mean(dim=2, keepdim=True).sqrt().clamp_min(1e-6)
    return torch.cat([torch.zeros_like(standard_LTE[:horizon]), standard_LTE[horizon:]])
