"""Routing as tensors: whole sequences packed along one token axis, and what earlier tokens say about later ones.

Shapes: S sequences, T tokens of all of them, L MoE layers, E experts, K experts per token, H horizons, R decay rates.
Nothing here looks forward: row t of every result depends on tokens before t of the same sequence alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from traces.schema import SequenceTrace, TraceSpec

SCAN_TOKENS = (
    64  # tokens a decayed scan handles with one matrix product; larger chunks cost more arithmetic, smaller more calls
)

HASH_FACTOR = 2_654_435_761  # 2**32 over the golden ratio, to the next odd number


@dataclass(frozen=True, eq=False)
class RoutingBatch:
    """Whole sequences packed along T, bounded by `offsets` (S+1); a column that is absent is None."""

    expert_ids_TLK: Tensor
    routing_weights_TLK: Tensor | None
    router_logits_TLE: Tensor | None
    lookahead_logits_THLE: Tensor | None
    token_ids_T: Tensor | None
    offsets: Tensor
    num_experts: int

    @classmethod
    def from_sequences(cls, sequences: Sequence[SequenceTrace], spec: TraceSpec) -> RoutingBatch:
        """Packs sequences in the order given: ids int64, all else float32; a column that any sequence lacks is None."""
        lengths = [len(sequence.expert_ids_TLK) for sequence in sequences]
        return cls(
            expert_ids_TLK=torch.from_numpy(
                np.concatenate([sequence.expert_ids_TLK for sequence in sequences]).astype(np.int64)
            ),
            routing_weights_TLK=_floats([sequence.routing_weights_TLK for sequence in sequences]),
            router_logits_TLE=_floats([sequence.router_logits_TLE for sequence in sequences]),
            lookahead_logits_THLE=_floats([sequence.lookahead_logits_THLE for sequence in sequences]),
            token_ids_T=_token_ids(sequences),
            offsets=torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int64),
            num_experts=spec.num_experts,
        )

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all sequences together."""
        return int(self.expert_ids_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.expert_ids_TLK.shape[1])

    @property
    def sequence_lengths(self) -> Tensor:
        """Tokens of each sequence, (S,)."""
        return self.offsets.diff()

    @property
    def sequence_of_token_T(self) -> Tensor:
        """The index of each token's sequence within the batch, (T,)."""
        return torch.repeat_interleave(
            torch.arange(len(self.offsets) - 1, device=self.offsets.device), self.sequence_lengths
        )

    def to(self, device: torch.device | str) -> RoutingBatch:
        """The same batch with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def packed_batches(
    sequences: Iterable[SequenceTrace], spec: TraceSpec, max_tokens: int
) -> Iterator[tuple[list[SequenceTrace], RoutingBatch]]:
    """Groups a stream of sequences into batches of at most `max_tokens` tokens; a longer sequence stands alone."""
    group: list[SequenceTrace] = []
    tokens = 0
    for sequence in sequences:
        length = len(sequence.expert_ids_TLK)
        if group and tokens + length > max_tokens:
            yield group, RoutingBatch.from_sequences(group, spec)
            group, tokens = [], 0
        group.append(sequence)
        tokens += length
    if group:
        yield group, RoutingBatch.from_sequences(group, spec)


def multi_hot(expert_ids_TLK: Tensor, num_experts: int) -> Tensor:
    """1.0 at each routed expert, 0.0 elsewhere: float32 (T, L, E)."""
    tokens, layers, _ = expert_ids_TLK.shape
    zeros = torch.zeros(tokens, layers, num_experts, device=expert_ids_TLK.device)
    return zeros.scatter_(2, expert_ids_TLK, 1.0)


def weighted_hot(expert_ids_TLK: Tensor, routing_weights_TLK: Tensor, num_experts: int) -> Tensor:
    """Each routed expert's share of its token's routing weight, 0.0 elsewhere: float32 (T, L, E), summing to 1."""
    tokens, layers, _ = expert_ids_TLK.shape
    shares_TLK = routing_weights_TLK / routing_weights_TLK.sum(dim=2, keepdim=True).clamp_min(1e-6)
    zeros = torch.zeros(tokens, layers, num_experts, device=expert_ids_TLK.device)
    return zeros.scatter_(2, expert_ids_TLK, shares_TLK)


def previous_token(values_T: Tensor, offsets: Tensor) -> Tensor:
    """The row of the token before, zeros for each sequence's first token; any shape (T, ...)."""
    shifted = torch.zeros_like(values_T)
    shifted[1:] = values_T[:-1]
    shifted[offsets[:-1]] = 0
    return shifted


def earlier_step(values_TL: Tensor, offsets: Tensor, steps: int) -> Tensor:
    """The row `steps` steps before in decoding order, zeros where the sequence has none; any shape (T, L, ...).

    Step t * L + l is the choice of token t at layer l, so below layer 0 lie the top layers of the token before.
    """
    layers = values_TL.shape[1]
    flat = values_TL.flatten(0, 1)
    shifted = torch.zeros_like(flat)
    shifted[steps:] = flat[: max(len(flat) - steps, 0)]
    for start in offsets[:-1].tolist():
        shifted[start * layers : start * layers + steps] = 0
    return shifted.view(values_TL.shape)


def last_used(hot_TLE: Tensor, offsets: Tensor) -> Tensor:
    """How many tokens ago each expert was last chosen at its layer, int32 (T, L, E), at least 1; 0 for never."""
    tokens = hot_TLE.shape[0]
    position_T = torch.arange(1, tokens + 1, dtype=torch.int32, device=hot_TLE.device)
    used_TLE = torch.where(hot_TLE > 0, position_T[:, None, None], 0)
    latest_TLE = torch.zeros_like(used_TLE)
    latest_TLE[1:] = used_TLE.cummax(dim=0).values[:-1]
    start_T = torch.repeat_interleave(offsets[:-1], offsets.diff()).to(latest_TLE)
    return torch.where(latest_TLE > start_T[:, None, None], position_T[:, None, None] - latest_TLE, 0)


def decayed_usage(hot_TLE: Tensor, offsets: Tensor, decays: Sequence[float]) -> Tensor:
    """Exponentially decayed averages of earlier tokens' choices, float32 (T, L, R, E).

    Entry r is (1 - d) * sum over j >= 1 of d**(j - 1) * hot[t - j] within the sequence, with d = decays[r] in [0, 1).
    Computed chunk by chunk: one product with a lower-triangular matrix inside, one carried state between.
    """
    tokens, layers, experts = hot_TLE.shape
    decay_R = torch.tensor(decays, dtype=torch.float32, device=hot_TLE.device)
    sequence_T = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    flat_TX = hot_TLE.reshape(tokens, layers * experts)
    usage = torch.empty(tokens, layers, len(decays), experts, device=hot_TLE.device)
    carry_RX = torch.zeros(len(decays), layers * experts, device=hot_TLE.device)
    for start in range(0, tokens, SCAN_TOKENS):
        chunk_CX = flat_TX[start : start + SCAN_TOKENS]
        sequence_C = sequence_T[start : start + SCAN_TOKENS]
        row_C = torch.arange(len(chunk_CX), device=hot_TLE.device)
        gap_CC = (row_C[:, None] - row_C[None, :] - 1).clamp_min(0)
        seen_CC = (row_C[:, None] > row_C[None, :]) & (sequence_C[:, None] == sequence_C[None, :])
        mix_RCC = torch.where(seen_CC, decay_R[:, None, None] ** gap_CC, 0.0)
        carried_C = sequence_C == sequence_T[max(start - 1, 0)]
        fade_RC = torch.where(carried_C, decay_R[:, None] ** row_C, 0.0)
        state_RCX = mix_RCC @ chunk_CX + fade_RC[:, :, None] * carry_RX[:, None, :]
        usage[start : start + SCAN_TOKENS] = (
            (state_RCX * (1 - decay_R)[:, None, None])
            .view(len(decays), len(chunk_CX), layers, experts)
            .permute(1, 2, 0, 3)
        )
        carry_RX = decay_R[:, None] * state_RCX[:, -1] + chunk_CX[-1]
    return usage


def bucketed(ids: Tensor, buckets: int) -> Tensor:
    """Ids hashed to 0 .. buckets - 1, int64, by Knuth's multiplication (The Art of Computer Programming, 6.4)."""
    return ((ids * HASH_FACTOR) & 0xFFFFFFFF) % buckets


def _floats(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    present = [array for array in arrays if array is not None]
    if len(present) < len(arrays):
        return None
    return torch.from_numpy(np.concatenate(present).astype(np.float32))


def _token_ids(sequences: Sequence[SequenceTrace]) -> Tensor | None:
    """Token ids int64 (T,); hashed from the strings where ids are unknown, None where neither is known."""
    parts: list[np.ndarray] = []
    for sequence in sequences:
        ids_T = np.asarray(sequence.token_ids_T, dtype=np.int64)
        if (ids_T < 0).any():
            if len(sequence.tokens_T) != len(ids_T):
                return None
            hashed_T = np.array([_hashed_token(token) for token in sequence.tokens_T], dtype=np.int64)
            ids_T = np.where(ids_T < 0, hashed_T, ids_T)
        parts.append(ids_T)
    return torch.from_numpy(np.concatenate(parts))


@lru_cache(maxsize=1 << 17)
def _hashed_token(token: str) -> int:
    return (
        int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little") >> 1
    )
