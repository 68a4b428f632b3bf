"""InterLayer one step at a time for one horizon h: take the choice of a layer, score the layer h steps on.

What the network derives from earlier steps lies in buffers of fixed place and size: the choices at this token and the
one before, usage, keys and sets of copy attention, keys and values of the context. A layer's step always reads and
writes the same places, and what changes from token to token is held in tensors too (`newest_1`, `slots_3`,
`distance_2W`), so that graph.py can record the steps and replay them on a GPU. The cost of a step grows with the
sequence up to the window of attention and no further; memory does not grow.

Shapes: L layers, E experts, K routed, D hidden size, H heads, W window, N width of a token's embedding, G what is known
of a choice (its set; its shares of the weight too where the network sees weights), X what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculation.interlayer.copy_attention import CopyAttention
from speculation.interlayer.network import COPY_FLOOR, InterLayerNetwork, token_bucket
from speculation.networks.layered import gelu, unit


class Lane:
    """One sequence at one horizon: `observe` every choice; `scores` are those of the step h after the last one."""

    @torch.inference_mode()
    def __init__(self, network: InterLayerNetwork, horizon: int) -> None:
        self.network, self.horizon = network, horizon
        self.layers, self.window = network.num_layers, network.settings.window
        settings, layers, experts, window = network.settings, self.layers, network.num_experts, self.window
        self.device = network.bias_LE.device
        zeros = network.bias_LE.detach().new_zeros
        self.path_GXE = zeros(1 + network.sees_weights, 2 * layers, experts)  # the token before, then this one
        self.earlier_LXE = zeros(layers, network.before_LXD.shape[1] // experts, experts)  # last choice, then usage
        self.fade_R1 = 1 - self._column(settings.decays)
        self.path_P, self.path_unit_P = zeros(2, settings.path_size)  # the sum over layers so far
        self.token_2N = zeros(2, settings.token_size)  # embeddings of the last complete token and the one under way
        self.read_LD = zeros(layers, settings.hidden_size)  # each layer's place and reading of the context
        self.newest_1 = zeros(1, dtype=torch.int64)  # the token under way
        self.later_21 = torch.arange(2, device=self.device)[:, None]
        self.slots_3 = zeros(3, dtype=torch.int64)  # where that token's row lies in a ring, and the next two
        self.places_W = torch.arange(window, device=self.device)
        self.distance_2W = zeros(2, window)  # of each place from that row and the next; inf where not in use
        if network.copy is not None:
            self.penalty_2HW1 = zeros(2, network.copy.heads, window, 1)
            self.copy_slopes_H1 = self._column(network.copy.slopes_H)
            self.keys_LHWX = zeros(layers, network.copy.heads, window, network.copy.key_size)
            self.sets_LWE = zeros(layers, window, experts)
        if network.context is not None:
            self.context_slopes_H11 = self._column([slope for (slope,) in network.context.slopes_H1])[..., None]
            size = settings.context_size // settings.context_heads
            self.context_memory = zeros(settings.context_blocks, 2, settings.context_heads, window, size)
        self.steps = [_step(self, layer) for layer in range(layers)]
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Begins another sequence."""
        network = self.network
        for buffer in (self.path_GXE, self.earlier_LXE, self.token_2N):
            buffer.zero_()
        self.read_LD.copy_(network.place_HLD[self.horizon - 1])
        if network.copy is not None:
            self.sets_LWE.zero_()
            self.keys_LHWX[:, :, 0] = unit(network.copy.empty_LHD)
        # Layers below h - 1 come up while the token before is under way; before the first token, now.
        self._go_to(-1)
        for layer in range(self.horizon - 1):
            self._remember(self.steps[layer])
        self._go_to(0)
        self.next_layer, self.pending, self.last_scores_E = 0, True, torch.empty(0)

    @torch.inference_mode()
    def begin_token(self, token_id: int | None) -> None:
        """Takes the id of the token that goes through the layers next, where the network reads tokens."""
        if self.network.sees_tokens:
            bucket = 0 if token_id is None else token_bucket(token_id, self.network.settings.token_buckets)
            self.token_2N[1] = self.network.token_BN[bucket]

    @torch.inference_mode()
    def observe(self, ids_K: Tensor, weights_K: Tensor | None) -> None:
        """Takes the choice at the next layer in decoding order."""
        layer = self.next_layer
        if self.pending:
            self._remember(self.steps[self._target()])
        self._take(layer, ids_K.to(self.device), None if weights_K is None else weights_K.to(self.device))
        self.next_layer, self.pending = (layer + 1) % self.layers, True

    @torch.inference_mode()
    def scores(self) -> Tensor:
        """Scores (E,), on the CPU, of the step h after the last one observed."""
        if self.pending:
            self.last_scores_E, self.pending = self._score(self.steps[self._target()]).cpu(), False
        return self.last_scores_E

    def _target(self) -> int:
        """The layer h steps after the last one observed."""
        return (self.next_layer - 1 + self.horizon) % self.layers

    def _in_use(self, later: int) -> int:
        """Places of the rings that the token under way, or with 1 the next, can look back to."""
        return min(self.token + later + 1, self.window)

    def _go_to(self, token: int) -> None:
        """Makes a token the one under way."""
        self.token = token
        self.newest_1.fill_(token)
        self._find_places()

    def _find_places(self) -> None:
        """Slots, distances and penalties of the token under way, computed on the device: a graph knows no token."""
        rows_21 = self.newest_1 + self.later_21
        torch.remainder(torch.cat([rows_21[:, 0], self.newest_1 + 2]), self.window, out=self.slots_3)
        distance_2W = torch.remainder(rows_21 - self.places_W, self.window)
        self.distance_2W.copy_(distance_2W).masked_fill_(distance_2W > rows_21, torch.inf)
        if self.network.copy is not None:
            torch.mul(self.distance_2W[:, None], -self.copy_slopes_H1, out=self.penalty_2HW1[..., 0])

    def _take(self, layer: int, ids_K: Tensor, weights_K: Tensor | None) -> None:
        """Puts a choice where later steps look for it."""
        step = self.steps[layer]
        step.choice_GE.zero_()
        step.choice_GE[0].scatter_(0, ids_K, 1.0)
        if self.network.sees_weights and weights_K is not None:
            share_K = weights_K / weights_K.sum().clamp_min(1e-6) * len(ids_K)
            step.choice_GE[1].scatter_(0, ids_K, share_K)
        set_E = step.choice_GE[0]
        step.last_GE.copy_(step.choice_GE)
        step.usage_RE.lerp_(set_E, self.fade_R1)
        if step.copy is not None:
            step.copy.sets_WE.index_copy_(0, self.slots_3[1:2], set_E[None])
        if self.network.settings.path_size:
            known_P = set_E @ self.network.path_LEP[layer]
            self.path_P.copy_(known_P) if layer == 0 else self.path_P.add_(known_P)
            self.path_unit_P.copy_(unit(self.path_P))
        if layer == self.layers - 1:
            self._end_token()

    def _end_token(self) -> None:
        """Takes a complete token into the context, and goes to the next."""
        network = self.network
        if network.context is not None:
            token_1C = (self.path_GXE[:, self.layers :].reshape(-1) @ network.embed_XC)[None]
            if network.sees_tokens:
                token_1C = token_1C + self.token_2N[1] @ network.token_NC
            places = self._in_use(0)
            penalty_H1W = self.distance_2W[0, :places] * -self.context_slopes_H11
            for block, memory in zip(network.context.stages(), self.context_memory, strict=True):
                query_H1X, key_H1X, value_H1X = block.project(token_1C)
                memory.index_copy_(2, self.slots_3[:1], torch.stack([key_H1X, value_H1X]))
                keys_HWX, values_HWX = memory[:, :, :places]
                match_H1W = torch.baddbmm(penalty_H1W, query_H1X, keys_HWX.transpose(1, 2))
                mixed_H1X = torch.bmm(torch.softmax(match_H1W, dim=-1), values_HWX)
                token_1C = block.finish(token_1C, mixed_H1X.flatten()[None], None)
            read_LD = (unit(token_1C) @ network.context_LCD)[:, 0]
            torch.add(network.place_HLD[self.horizon - 1], read_LD, out=self.read_LD)
        self.path_GXE[:, : self.layers] = self.path_GXE[:, self.layers :]
        self.token_2N[0] = self.token_2N[1]
        self.token += 1
        self.newest_1.add_(1)
        self._find_places()

    def _remember(self, step: _LayerStep) -> None:
        """What later tokens look for in a step whose scores nobody asked for."""
        if step.copy is not None:
            hidden_D = gelu(torch.addmv(step.read_D, step.evidence_DX, torch.cat(step.evidence)))
            step.copy.keys_HWX.index_copy_(1, step.copy.slot_1, step.copy.key(hidden_D)[:, None])

    def _score(self, step: _LayerStep) -> Tensor:
        """Follows InterLayerNetwork._scores for one step."""
        evidence_D = torch.addmv(step.read_D, step.evidence_DX, torch.cat(step.evidence))
        hidden_D, found = gelu(evidence_D), [step.earlier_XE]
        if step.copy is not None:
            key_HX, places = step.copy.key(hidden_D), self._in_use(step.copy.later)
            query_HX1 = (key_HX * step.copy.sharpness_H1)[..., None]
            match_HW1 = torch.baddbmm(step.copy.penalty_HW1[:, :places], step.copy.keys_HWX[:, :places], query_HX1)
            copied_HE = torch.softmax(match_HW1[..., 0], dim=-1) @ step.copy.sets_WE[:places]
            step.copy.keys_HWX.index_copy_(1, step.copy.slot_1, key_HX[:, None])
            hidden_D = hidden_D + gelu(torch.addmv(evidence_D, step.copy.found_DX, copied_HE.view(-1)))
            found += [copied_HE, (copied_HE + COPY_FLOOR).log_()]
        inner_M = gelu(torch.mv(step.up_MD, unit(hidden_D)))
        hidden_D = torch.addmv(hidden_D, step.down_DM, inner_M)
        scores_E = torch.addmv(step.bias_E, step.head_ED, unit(hidden_D))
        return torch.addmv(scores_E, torch.cat(found).t(), step.found_X)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]


@dataclass(frozen=True)
class _CopyStep:
    """Copy attention of one layer: its weights, and its part of the lane's buffers."""

    later: int  # 1 where the layer is scored while the token before is under way
    slot_1: Tensor  # where its key belongs
    penalty_HW1: Tensor
    keys_HWX: Tensor
    sets_WE: Tensor
    key_XD: Tensor
    sharpness_H1: Tensor
    found_DX: Tensor

    def key(self, hidden_D: Tensor) -> Tensor:
        """As CopyAttention.keys, for one step."""
        return unit(torch.mv(self.key_XD, unit(hidden_D)).view(len(self.sharpness_H1), -1))


@dataclass(frozen=True)
class _LayerStep:
    """One layer: views of the lane's buffers and of the weights, made once because making them takes time."""

    choice_GE: Tensor  # of the token under way
    last_GE: Tensor
    usage_RE: Tensor
    earlier_XE: Tensor  # the two above, beside each other
    evidence: tuple[Tensor, ...]
    evidence_DX: Tensor  # the tables of that evidence
    read_D: Tensor
    up_MD: Tensor
    down_DM: Tensor
    head_ED: Tensor
    bias_E: Tensor
    found_X: Tensor  # what each row of `earlier_XE` and of copied shares adds to an expert's score
    copy: _CopyStep | None


def _step(lane: Lane, layer: int) -> _LayerStep:
    """Follows InterLayerNetwork._evidence in what a layer may see at the lane's horizon."""
    network, horizon, known = lane.network, lane.horizon, len(lane.path_GXE)
    layers, experts, reach = network.num_layers, network.num_experts, network.reach
    # Below layer h - 1, the token before is the one under way.
    later = int(layer < horizon - 1)
    row = layer + layers * (1 + later)
    evidence = [lane.path_GXE[0, row - reach : row - horizon + 1].view(-1)]
    # The table's blocks go back in time, the path's rows forward.
    blocks_XED = network.below_LXD[layer, (horizon - 1) * experts : reach * experts].unflatten(0, (-1, experts))
    tables = [blocks_XED.flip(0).flatten(0, 1)]
    if network.sees_weights:
        evidence.append(lane.path_GXE[1, row - horizon])
        tables.append(network.below_LXD[layer, reach * experts :])
    evidence.append(lane.earlier_LXE[layer].view(-1))
    tables.append(network.before_LXD[layer])
    if network.settings.path_size and layer >= horizon:
        evidence.append(lane.path_unit_P)
        tables.append(network.path_LPD[layer])
    if network.sees_tokens:
        now_ND, then_ND = network.token_LND[layer].chunk(2)
        evidence.append(lane.token_2N[later])
        tables.append(then_ND)
        if layer >= horizon:
            evidence.append(lane.token_2N[1])
            tables.append(now_ND)
    recent_R = network.recent_LR[layer]
    found = [recent_R[:1], recent_R.new_zeros(known - 1), recent_R[1:]]
    if network.copy is not None:
        found += [network.copied_LH[layer], network.log_copied_LH[layer]]
    return _LayerStep(
        choice_GE=lane.path_GXE[:, layers + layer],
        last_GE=lane.earlier_LXE[layer, :known],
        usage_RE=lane.earlier_LXE[layer, known:],
        earlier_XE=lane.earlier_LXE[layer],
        evidence=tuple(evidence),
        evidence_DX=torch.cat(tables).t(),
        read_D=lane.read_LD[layer],
        up_MD=network.up_LDM[layer].t(),
        down_DM=network.down_LMD[layer].t(),
        head_ED=network.head_LDE[layer].t(),
        bias_E=network.bias_LE[layer],
        found_X=torch.cat(found),
        copy=None if network.copy is None else _copy_step(lane, network.copy, layer, later),
    )


def _copy_step(lane: Lane, copy: CopyAttention, layer: int, later: int) -> _CopyStep:
    return _CopyStep(
        later=later,
        slot_1=lane.slots_3[later + 1 : later + 2],
        penalty_HW1=lane.penalty_2HW1[later],
        keys_HWX=lane.keys_LHWX[layer],
        sets_WE=lane.sets_LWE[layer],
        key_XD=copy.key_LDX[layer].t(),
        sharpness_H1=copy.sharpness_LH[layer].exp()[:, None],
        found_DX=lane.network.copied_LXD[layer].t(),
    )
