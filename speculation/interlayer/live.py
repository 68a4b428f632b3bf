"""InterLayer one token and one layer at a time: running sums instead of whole sequences, equal to the batch scores.

A `Lane` scores every step in decoding order for one horizon. It keeps what the network derives from earlier steps: the
last sets, usage, keys and sets of copy attention, keys and values of the context. The cost of a step grows with the
sequence up to the window of attention and no further; so does memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speculation.interlayer.network import COPY_FLOOR, InterLayerNetwork, token_bucket
from speculation.live import LiveState
from speculation.networks.layered import gelu, unit
from speculation.networks.windowed_attention import Slopes
from speculation.predictor import RoutingShape

PATH_TOKENS = 16  # tokens of sets kept in a row before the oldest are dropped


class InterLayerLive(LiveState):
    """The record of a sequence, and a lane for each horizon asked for."""

    def __init__(self, shape: RoutingShape, network: InterLayerNetwork) -> None:
        super().__init__(shape)
        self.network = network
        self.lanes: dict[int, Lane] = {}

    def begin_token(self, token_id: int | None = None) -> None:
        super().begin_token(token_id)
        for lane in self.lanes.values():
            lane.begin_token(token_id)

    def observe(
        self,
        expert_ids_K: Sequence[int] | Tensor,
        routing_weights_K: Sequence[float] | Tensor | None = None,
        lookahead_logits_HE: Tensor | None = None,
    ) -> None:
        super().observe(expert_ids_K, routing_weights_K, lookahead_logits_HE)
        for lane in self.lanes.values():
            self._feed(lane, self.num_steps - 1)

    def scores(self, horizon: int) -> Tensor:
        """Scores (E,) for the step `horizon` after the last observed; a horizon's first call replays the sequence."""
        if horizon not in self.lanes:
            lane = Lane(self.network, horizon)
            for step in range(self.num_steps):
                if step % self.shape.num_layers == 0:
                    lane.begin_token(self.token_ids[step // self.shape.num_layers])
                self._feed(lane, step)
            if (
                self.num_steps % self.shape.num_layers == 0
                and self.token_ids[self.num_steps // self.shape.num_layers :]
            ):
                lane.begin_token(self.token_ids[-1])
            self.lanes[horizon] = lane
        return self.lanes[horizon].scores(self.num_steps - 1 + horizon)

    def _feed(self, lane: Lane, step: int) -> None:
        lane.observe(step, self.expert_ids[step], self.routing_weights[step] if self.routing_weights else None)


class Lane:
    """All steps of one sequence at one horizon; rows of `path_XE` are steps in decoding order after one of zeros."""

    @torch.inference_mode()
    def __init__(self, network: InterLayerNetwork, horizon: int) -> None:
        self.network, self.horizon = network, horizon
        settings, layers, experts = network.settings, network.num_layers, network.num_experts
        device = network.bias_LE.device
        self.layers, self.experts, self.device = layers, experts, device
        self.next_step, self.last_scores_E = 0, torch.empty(0)
        self.path_XE = torch.zeros((PATH_TOKENS + 3) * layers, experts, device=device)
        self.path_share_XE = torch.zeros_like(self.path_XE)
        self.origin = layers  # the row of step 0; falls as old rows are dropped
        # Beside each other as `before_LXD` wants them: the last set, its shares of the weight, usage.
        rows = network.before_LXD.shape[1] // experts
        self.earlier_LRE = torch.zeros(layers, rows, experts, device=device)
        self.usage_LRE = self.earlier_LRE[:, 2 if network.sees_weights else 1 :]
        self.decay_R1 = torch.tensor(settings.decays, device=device)[:, None]
        # The table's blocks go back in time, the path's rows forward.
        blocks = network.below_LXD[:, (horizon - 1) * experts : network.reach * experts]
        self.below_LXD = blocks.unflatten(1, (-1, experts)).flip(1).flatten(1, 2)
        self.token_rows: list[Tensor] = []
        self.place_LD = network.place_HLD[horizon - 1]
        # Place and reading of the context at the token being decoded and at the one before it.
        self.read_LD = self.read_before_LD = self.place_LD
        self.tokens_done = 0
        if network.copy is not None:
            copy = network.copy
            self.copy_ring = Ring((copy.slopes_H,), settings.window, device)
            self.keys_LHWX = torch.zeros(layers, copy.heads, settings.window, copy.key_size, device=device)
            self.keys_LHWX[:, :, 0] = unit(copy.empty_LHD)
            self.sets_LWE = torch.zeros(layers, settings.window, experts, device=device)
            self.sharpness_LH1 = copy.sharpness_LH.exp()[..., None]
        if network.context is not None:
            size = settings.context_size // settings.context_heads
            self.context_ring = Ring(network.context.slopes_H1, settings.window, device)
            memory = settings.context_blocks, 2, settings.context_heads, settings.window, size
            self.context_memory = torch.zeros(memory, device=device)
        if settings.path_size:
            self.path_P = torch.zeros(settings.path_size, device=device)

    @torch.inference_mode()
    def begin_token(self, token_id: int | None) -> None:
        """Keeps the token's embedding where the network reads tokens."""
        if self.network.sees_tokens:
            buckets = self.network.settings.token_buckets
            bucket = 0 if token_id is None else token_bucket(token_id, buckets)
            self.token_rows.append(self.network.token_BN[bucket])

    @torch.inference_mode()
    def observe(self, step: int, ids_K: Tensor, weights_K: Tensor | None) -> None:
        """Takes the choice of a step into all sums; its own score is computed before, asked for or not."""
        if self.next_step == step:
            self._compute(step, with_scores=False)
        token, layer = divmod(step, self.layers)
        if self.origin + step == len(self.path_XE):
            self._drop_old_rows(step)
        row = self.origin + step
        set_E = self.path_XE[row].zero_().index_fill_(0, ids_K.to(self.device), 1.0)
        self.usage_LRE[layer].mul_(self.decay_R1).add_((1 - self.decay_R1) * set_E)
        self.earlier_LRE[layer, 0] = set_E
        if self.network.sees_weights:
            share_E = self.path_share_XE[row].zero_()
            if weights_K is not None:
                share_K = weights_K / weights_K.sum().clamp_min(1e-6) * len(ids_K)
                share_E[ids_K.to(self.device)] = share_K.to(self.device)
            self.earlier_LRE[layer, 1] = share_E
        if self.network.copy is not None:
            self.sets_LWE[layer, self.copy_ring.slot(token + 1)] = set_E
        if layer == self.layers - 1:
            self._end_token(token)

    @torch.inference_mode()
    def scores(self, step: int) -> Tensor:
        """Scores (E,) of a step at most `horizon` after the last one observed."""
        while self.next_step <= step:
            self._compute(self.next_step, with_scores=self.next_step == step)
        return self.last_scores_E

    def _drop_old_rows(self, step: int) -> None:
        """Moves the rows of the two tokens before `step` to the front."""
        kept = 2 * self.layers
        for path in (self.path_XE, self.path_share_XE):
            path[:kept] = path[-kept:].clone()
        self.origin = kept - step

    def _compute(self, step: int, with_scores: bool) -> None:
        """Follows InterLayerNetwork._scores for one step; without scores, just what later steps need of it."""
        network = self.network
        token, layer = divmod(step, self.layers)
        self.next_step = step + 1
        evidence_D = self._evidence(token, layer, self.origin + step)
        hidden_D = gelu(evidence_D)
        if network.copy is not None:
            key_HX = unit((unit(hidden_D) @ network.copy.key_LDX[layer]).view(network.copy.heads, -1))
            seen, penalty = self.copy_ring.seen(token)
            keys_HWX = self.keys_LHWX[layer, :, :seen]
            match_HW = torch.bmm(keys_HWX, (key_HX * self.sharpness_LH1[layer])[..., None])[..., 0]
            copied_HE = torch.softmax(match_HW + penalty[0], dim=-1) @ self.sets_LWE[layer, :seen]
            self.keys_LHWX[layer, :, self.copy_ring.slot(token + 1)] = key_HX
            hidden_D = hidden_D + gelu(torch.addmv(evidence_D, network.copied_LXD[layer].t(), copied_HE.view(-1)))
        if not with_scores:
            return
        inner_M = gelu(unit(hidden_D) @ network.up_LDM[layer])
        hidden_D = torch.addmv(hidden_D, network.down_LMD[layer].t(), inner_M)
        scores_E = torch.addmv(network.bias_LE[layer], network.head_LDE[layer].t(), unit(hidden_D))
        recent_R = network.recent_LR[layer]
        scores_E = torch.addmv(scores_E, self.usage_LRE[layer].t(), recent_R[1:]).add_(
            self.earlier_LRE[layer, 0] * recent_R[0]
        )
        if network.copy is not None:
            scores_E.addmv_(copied_HE.t(), network.copied_LH[layer])
            scores_E.addmv_((copied_HE + COPY_FLOOR).log_().t(), network.log_copied_LH[layer])
        self.last_scores_E = scores_E.cpu()

    def _evidence(self, token: int, layer: int, row: int) -> Tensor:
        """Follows InterLayerNetwork._evidence for one step."""
        network, horizon = self.network, self.horizon
        # Below layer h - 1, the top layers of the token before are not known, nor is the context that includes them.
        complete = token if layer >= horizon - 1 else token - 1
        evidence_D = (self.read_LD if complete == self.tokens_done else self.read_before_LD)[layer]
        path_X = self.path_XE[row - network.reach : row - horizon + 1].view(-1)
        evidence_D = torch.addmv(evidence_D, self.below_LXD[layer].t(), path_X)
        evidence_D = torch.addmv(evidence_D, network.before_LXD[layer].t(), self.earlier_LRE[layer].view(-1))
        if network.sees_weights:
            share_XD = network.below_LXD[layer, network.reach * self.experts :]
            evidence_D = torch.addmv(evidence_D, share_XD.t(), self.path_share_XE[row - horizon])
        if network.settings.path_size and layer >= horizon:
            known_P = self.path_XE[row - horizon] @ network.path_LEP[layer - horizon]
            self.path_P = known_P if layer == horizon else self.path_P + known_P
            evidence_D = torch.addmv(evidence_D, network.path_LPD[layer].t(), unit(self.path_P))
        if network.sees_tokens:
            nothing_N = network.token_BN.new_zeros(network.token_BN.shape[1])
            now_N = self.token_rows[token] if layer >= horizon else nothing_N
            then_N = self.token_rows[token - 1] if token else nothing_N
            evidence_D = torch.addmv(evidence_D, network.token_LND[layer].t(), torch.cat([now_N, then_N]))
        return evidence_D

    def _end_token(self, token: int) -> None:
        """Takes a complete token into the context; once per token, so its cost is shared by L layers."""
        network = self.network
        self.tokens_done, self.read_before_LD = token + 1, self.read_LD
        if network.context is None:
            return
        first = self.origin + token * self.layers
        paths = (self.path_XE, self.path_share_XE) if network.sees_weights else (self.path_XE,)
        token_X = torch.cat([path[first : first + self.layers].view(-1) for path in paths])
        token_1C = (token_X @ network.embed_XC)[None]
        if network.sees_tokens:
            token_1C = token_1C + self.token_rows[token] @ network.token_NC
        slot, (seen, penalty_H1W) = self.context_ring.slot(token), self.context_ring.seen(token)
        for block, memory in zip(network.context.stages(), self.context_memory, strict=True):
            query_H1X, key_H1X, value_H1X = block.project(token_1C)
            memory[0, :, slot], memory[1, :, slot] = key_H1X[:, 0], value_H1X[:, 0]
            keys_HWX, values_HWX = memory[:, :, :seen]
            match_H1W = torch.baddbmm(penalty_H1W, query_H1X, keys_HWX.transpose(1, 2))
            mixed_H1X = torch.bmm(torch.softmax(match_H1W, dim=-1), values_HWX)
            token_1C = block.finish(token_1C, mixed_H1X.flatten()[None], None)
        self.read_LD = self.place_LD + (unit(token_1C) @ network.context_LCD)[:, 0]


class Ring:
    """Where the last `window` rows lie in a buffer of that many, and what their distance costs."""

    def __init__(self, slopes_NH: Slopes, window: int, device: torch.device) -> None:
        self.window = window
        # Twice the penalties of distances window - 1 to 0, so that each rotation of them is a slice.
        distance_W = torch.arange(window - 1, -1, -1, device=device).repeat(2)
        self.penalty_NHW = -torch.tensor(slopes_NH, device=device)[..., None] * distance_W

    def slot(self, row: int) -> int:
        """The place of a row, taken from the row `window` before it."""
        return row % self.window

    def seen(self, row: int) -> tuple[int, Tensor]:
        """How many places are in use when `row` is the newest, and their penalties (N, H, places)."""
        places = min(row + 1, self.window)
        start = (self.window - 1 - row) % self.window
        return places, self.penalty_NHW[..., start : start + places]
