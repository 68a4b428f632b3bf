"""InterLayer's network. All layers side by side, each with its own tables; sets go in and out as vectors over experts.

1. Evidence for (token t, layer l): the sets of the layers below in decoding order, the token before's set at l, decayed
   usage at l, a context of all earlier tokens; each through layer l's own table, added up.
2. Copy attention: the sets that layer l chose at earlier tokens with like evidence, into hidden state and scores.
3. One MLP for each layer, and a head that starts from what each expert's frequency says under the loss.

What horizon h hides: in 1, the h - 1 layers nearest below, and for layers below h - 1 the token before's part of the
context, whose top layers are not known then. All else builds on the evidence or on tokens before. Cost per token is
linear in L, and in the window of tokens that attention reaches back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from speculation.features import RoutingBatch, decayed_usage
from speculation.interlayer.copy_attention import CopyAttention
from speculation.networks.layered import drop, gelu, table, token_before, unit, working_dtype
from speculation.networks.token_context import TokenContext
from speculation.predictor import MAX_HORIZON, RoutingShape

if TYPE_CHECKING:
    from speculation.interlayer.predictor import InterLayerOptions

IdOrIds = TypeVar("IdOrIds", int, Tensor)
COPY_FLOOR = 0.02  # added before the logarithm of a copied share; the share of an expert never chosen is 0


@dataclass
class Routing:
    """A batch as the network reads it: sets, shares of the routing weight and decayed usage, each (L, T, ...)."""

    hot_LTE: Tensor
    share_LTE: (
        Tensor | None
    )  # times K, so that shares are about 1 as sets are; None where the network has no use for it
    usage_LTX: Tensor
    buckets_T: Tensor | None
    offsets: list[int]
    starts_S: Tensor

    @classmethod
    def of(cls, batch: RoutingBatch, network: InterLayerNetwork, generator: torch.Generator | None) -> Routing:
        """Reads a batch in the working precision; a generator hides some sequences' weights and some tokens' ids."""
        settings, device = network.settings, batch.expert_ids_TLK.device
        dtype = working_dtype(device)
        ids_LTK = batch.expert_ids_TLK.transpose(0, 1).contiguous()
        zeros_LTE = torch.zeros(*ids_LTK.shape[:2], batch.num_experts, dtype=dtype, device=device)
        hot_LTE = zeros_LTE.scatter(2, ids_LTK, 1.0)
        share_LTE = None
        if network.sees_weights:
            share_LTE = zeros_LTE
            if batch.routing_weights_TLK is not None:
                weights_LTK = batch.routing_weights_TLK.transpose(0, 1)
                share_LTK = weights_LTK / weights_LTK.sum(dim=2, keepdim=True).clamp_min(1e-6) * ids_LTK.shape[2]
                if generator is not None:
                    shown_S = _kept(len(batch.offsets) - 1, settings.weight_dropout, generator, device)
                    share_LTK = share_LTK * shown_S.repeat_interleave(batch.sequence_lengths)[:, None]
                share_LTE = zeros_LTE.scatter(2, ids_LTK, share_LTK.to(dtype))
        usage_TLRE = decayed_usage(hot_LTE.transpose(0, 1).float(), batch.offsets, settings.decays)
        buckets_T = None
        if network.sees_tokens:
            buckets_T = torch.zeros(batch.num_tokens, dtype=torch.int64, device=device)
            if batch.token_ids_T is not None:
                buckets_T = token_bucket(batch.token_ids_T, settings.token_buckets)
                if generator is not None:
                    buckets_T = buckets_T * _kept(batch.num_tokens, settings.token_dropout, generator, device)
        usage_LTX = usage_TLRE.transpose(0, 1).flatten(2).to(dtype)
        offsets = batch.offsets.tolist()
        return cls(hot_LTE, share_LTE, usage_LTX, buckets_T, offsets, batch.offsets[:-1])


def token_bucket(token_ids: IdOrIds, buckets: int) -> IdOrIds:
    """The row of a token's embedding; 0 stands for a token that is not known."""
    return 1 + token_ids % buckets


class InterLayerNetwork(nn.Module):
    """Scores of all experts, layers and tokens of a batch for one horizon."""

    def __init__(
        self,
        shape: RoutingShape,
        settings: InterLayerOptions,
        columns: frozenset[str],
        generator: torch.Generator,
        bias_LE: Tensor,
    ) -> None:
        super().__init__()
        layers, experts, hidden = shape.num_layers, shape.num_experts, settings.hidden_size
        self.settings, self.num_layers, self.num_experts = settings, layers, experts
        self.sees_weights, self.sees_tokens = "weights" in columns, "tokens" in columns
        self.horizons = min(MAX_HORIZON, layers)
        self.reach = max(min(settings.reach, layers), self.horizons)
        weighted, rates = int(self.sees_weights), len(settings.decays)
        scale = 0.5 * shape.top_k**-0.5
        self.below_LXD = table(generator, layers, (self.reach + weighted) * experts, hidden, scale=scale)
        self.before_LXD = table(generator, layers, (1 + weighted + rates) * experts, hidden, scale=scale)
        self.place_HLD = table(generator, self.horizons, layers, hidden, scale=0.1)
        self.context = self.copy = None
        if settings.context_size:
            size = settings.context_size
            scale_in = (shape.top_k * layers) ** -0.5
            self.embed_XC = table(generator, (1 + weighted) * layers * experts, size, scale=scale_in)
            self.context = TokenContext(
                size, settings.context_blocks, settings.context_heads, settings.window, settings.dropout, generator
            )
            self.context_LCD = table(generator, layers, size, hidden, scale=size**-0.5)
        if settings.path_size:
            self.path_LEP = table(generator, layers, experts, settings.path_size, scale=shape.top_k**-0.5)
            self.path_LPD = table(generator, layers, settings.path_size, hidden, scale=0.5 * settings.path_size**-0.5)
        if self.sees_tokens:
            size = settings.token_size
            # Tokens never seen in training stay at zero and so say nothing.
            self.token_BN = nn.Parameter(torch.zeros(settings.token_buckets + 1, size))
            self.token_LND = table(generator, layers, 2 * size, hidden, scale=size**-0.5)
            if settings.context_size:
                self.token_NC = table(generator, size, settings.context_size, scale=size**-0.5)
        if settings.copy_heads:
            self.copy = CopyAttention(
                layers, hidden, settings.copy_heads, settings.copy_key_size, settings.window, generator
            )
            self.copied_LXD = table(generator, layers, settings.copy_heads * experts, hidden, scale=scale)
            self.copied_LH = nn.Parameter(torch.zeros(layers, settings.copy_heads))
            self.log_copied_LH = nn.Parameter(torch.full((layers, settings.copy_heads), 0.1))
        self.up_LDM = table(generator, layers, hidden, settings.mlp_size, scale=hidden**-0.5)
        self.down_LMD = table(generator, layers, settings.mlp_size, hidden, scale=0.5 * settings.mlp_size**-0.5)
        self.head_LDE = table(generator, layers, hidden, experts, scale=0.02)
        # An expert's own recent use speaks for it directly; hidden_size may be below E.
        self.recent_LR = nn.Parameter(torch.zeros(layers, 1 + rates))
        self.bias_LE = nn.Parameter(bias_LE)

    def forward(self, batch: RoutingBatch, horizon: int, generator: torch.Generator | None) -> Tensor:
        """Scores float32 (T, L, E); products are computed in autocast's precision where that is on."""
        routing = Routing.of(batch, self, generator)
        with torch.autocast(batch.expert_ids_TLK.device.type, enabled=False):
            return self._scores(routing, horizon, generator).transpose(0, 1)

    def matrices(self) -> list[str]:
        """Names of the weights that act as matrices, which Muon trains; AdamW is for scales, biases and embeddings."""
        others = {"place_HLD", "recent_LR", "bias_LE", "token_BN", "copied_LH", "log_copied_LH"}
        others |= {"copy.sharpness_LH", "copy.empty_LHD"}
        return [name for name, each in self.named_parameters() if each.dim() >= 2 and name not in others]

    def _scores(self, routing: Routing, horizon: int, generator: torch.Generator | None) -> Tensor:
        settings, dtype = self.settings, routing.hot_LTE.dtype
        before_LTE = token_before(routing.hot_LTE, routing.starts_S)
        evidence_LTD = self._evidence(routing, before_LTE, horizon, generator)
        hidden_LTD = gelu(evidence_LTD)
        copied_LHTE = None
        if self.copy is not None:
            copied_LHTE = self.copy(hidden_LTD, before_LTE, routing.offsets, routing.starts_S)
            found_LTD = torch.bmm(copied_LHTE.transpose(1, 2).flatten(2), self.copied_LXD.to(dtype))
            hidden_LTD = hidden_LTD + gelu(evidence_LTD + found_LTD)
        inner_LTM = gelu(torch.bmm(unit(hidden_LTD), self.up_LDM.to(dtype)))
        hidden_LTD = hidden_LTD + drop(torch.bmm(inner_LTM, self.down_LMD.to(dtype)), settings.dropout, generator)
        last_LTD = drop(unit(hidden_LTD), settings.dropout, generator)
        scores_LTE: Tensor = torch.bmm(last_LTD, self.head_LDE.to(dtype)).float() + self.bias_LE[:, None]
        scores_LTE = scores_LTE + before_LTE * self.recent_LR[:, :1, None].to(dtype)
        usage_LTRE = routing.usage_LTX.unflatten(2, (-1, self.num_experts))
        scores_LTE = scores_LTE + (usage_LTRE * self.recent_LR[:, None, 1:, None].to(dtype)).sum(dim=2)
        if copied_LHTE is not None:
            scores_LTE = scores_LTE + (copied_LHTE * self.copied_LH[..., None, None].to(dtype)).sum(dim=1)
            log_copied_LHTE = (copied_LHTE + COPY_FLOOR).log()
            scores_LTE = scores_LTE + (log_copied_LHTE * self.log_copied_LH[..., None, None].to(dtype)).sum(dim=1)
        return scores_LTE

    def _evidence(
        self, routing: Routing, before_LTE: Tensor, horizon: int, generator: torch.Generator | None
    ) -> Tensor:
        """What speaks for the choice of each layer and token, (L, T, D), before any non-linearity."""
        layers, experts, reach = self.num_layers, self.num_experts, self.reach
        hot_LTE, share_LTE, dtype = routing.hot_LTE, routing.share_LTE, routing.hot_LTE.dtype
        # Backwards in decoding order from layer l: this token's layers below, then the top layers of the token before.
        path_PTE = torch.cat([before_LTE[layers - reach :], hot_LTE])
        below = [path_PTE[reach - back : reach - back + layers] for back in range(horizon, reach + 1)]
        earlier = [before_LTE]
        if share_LTE is not None:
            before_share_LTE = token_before(share_LTE, routing.starts_S)
            below.append(torch.cat([before_share_LTE[layers - horizon :], share_LTE[: layers - horizon]]))
            earlier.append(before_share_LTE)
        earlier.append(routing.usage_LTX)
        evidence_LTD = torch.bmm(torch.cat(below, dim=2), self.below_LXD[:, (horizon - 1) * experts :].to(dtype))
        evidence_LTD = evidence_LTD + torch.bmm(torch.cat(earlier, dim=2), self.before_LXD.to(dtype))
        evidence_LTD = evidence_LTD + self.place_HLD[horizon - 1].to(dtype)[:, None]
        if self.context is not None:
            evidence_LTD = evidence_LTD + self._context(routing, horizon, generator)
        if self.settings.path_size:
            path_LTP = torch.bmm(hot_LTE, self.path_LEP.to(dtype)).cumsum(dim=0)[: layers - horizon]
            found_LTD = torch.bmm(unit(path_LTP), self.path_LPD[horizon:].to(dtype))
            evidence_LTD = torch.cat([evidence_LTD[:horizon], evidence_LTD[horizon:] + found_LTD])
        if routing.buckets_T is not None:
            token_TN = self.token_BN.to(dtype)[routing.buckets_T]
            now_TD, then_TN = token_TN, token_before(token_TN, routing.starts_S)
            now_LTN = torch.cat(
                [torch.zeros_like(now_TD).expand(horizon, -1, -1), now_TD.expand(layers - horizon, -1, -1)]
            )
            pair_LTX = torch.cat([now_LTN, then_TN.expand(layers, -1, -1)], dim=2)
            evidence_LTD = evidence_LTD + torch.bmm(pair_LTX, self.token_LND.to(dtype))
        return evidence_LTD

    def _context(self, routing: Routing, horizon: int, generator: torch.Generator | None) -> Tensor:
        """Each layer's reading (L, T, D) of the earlier tokens; one token older where the last is not complete."""
        assert self.context is not None
        dtype = routing.hot_LTE.dtype
        columns = [routing.hot_LTE] if routing.share_LTE is None else [routing.hot_LTE, routing.share_LTE]
        tokens_TX = torch.cat([column.transpose(0, 1).flatten(1) for column in columns], dim=1)
        tokens_TC = tokens_TX @ self.embed_XC.to(dtype)
        if routing.buckets_T is not None:
            tokens_TC = tokens_TC + self.token_BN.to(dtype)[routing.buckets_T] @ self.token_NC.to(dtype)
        context_TC = token_before(self.context(tokens_TC, routing.offsets, generator), routing.starts_S)
        read_LTD = context_TC @ self.context_LCD.to(dtype)
        older_LTD = token_before(read_LTD[: horizon - 1], routing.starts_S)
        return torch.cat([older_LTD, read_LTD[horizon - 1 :]])


def _kept(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """1 where kept, 0 where dropped."""
    return (torch.rand(count, generator=generator, device=device) >= share).long()
