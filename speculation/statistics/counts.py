"""What `statistics` counts in one pass: which experts are chosen together, in decoding order, and after which tokens.

pairs[l, d, i, j]: how often expert i was chosen d steps before the choice of j at layer l. The L steps before one are
the layers below and, past layer 0, the top layers of the token before; d = 0 is co-activation within a set. From these
follow usage, transitions over every distance, and how the sources of a transition depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculation.features import RoutingBatch, bucketed, earlier_step, multi_hot
from speculation.predictor import RoutingShape

MAX_PAIRS = 1 << 25  # entries of `pairs`: 128 MiB; for E = 256 and L = 61 that is a reach of 7 steps, else all L
MAX_TOKEN_ENTRIES = 1 << 23  # entries of `tokens`: 32 MiB
MAX_BUCKETS = 4096


@dataclass
class StatisticsCounts:
    """int32 counts of some sequences; counts of parts add up to the counts of the whole.

    pairs_LDEE as above, D = reach + 1. tokens_BLE[b, l, j]: how often j was chosen at layer l for a token whose id
    falls into bucket b; B = 0 where tokens are not counted. observed: the number of tokens.
    """

    pairs_LDEE: Tensor
    tokens_BLE: Tensor
    observed: int = 0

    @classmethod
    def zeros(cls, shape: RoutingShape, tokens: bool) -> StatisticsCounts:
        """No observation yet; reach and buckets as many as the limits above allow."""
        layers, experts = shape.num_layers, shape.num_experts
        reach = min(layers, max(1, MAX_PAIRS // (layers * experts**2) - 1))
        buckets = min(MAX_BUCKETS, 1 << max(MAX_TOKEN_ENTRIES // (layers * experts), 1).bit_length() - 1)
        return cls(
            torch.zeros(layers, reach + 1, experts, experts, dtype=torch.int32),
            torch.zeros(buckets if tokens else 0, layers, experts, dtype=torch.int32),
        )

    @property
    def reach(self) -> int:
        """How many steps back pairs are counted."""
        return self.pairs_LDEE.shape[1] - 1

    def add(self, batch: RoutingBatch) -> None:
        """Counts whole sequences; float32 products stay exact for batches below 2**24 tokens."""
        hot_TLE = multi_hot(batch.expert_ids_TLK, batch.num_experts)
        hot_LTE = hot_TLE.transpose(0, 1).contiguous()
        for distance in range(self.reach + 1):
            before_TLE = earlier_step(hot_TLE, batch.offsets, distance) if distance else hot_TLE
            self.pairs_LDEE[:, distance] += torch.bmm(before_TLE.permute(1, 2, 0), hot_LTE).int()
        if len(self.tokens_BLE) and batch.token_ids_T is not None:
            bucket_T = bucketed(batch.token_ids_T, len(self.tokens_BLE))
            self.tokens_BLE.index_add_(0, bucket_T, hot_TLE.int())
        self.observed += batch.num_tokens

    def merge(self, other: StatisticsCounts) -> None:
        """Adds the counts of another part of the data."""
        self.pairs_LDEE += other.pairs_LDEE
        self.tokens_BLE += other.tokens_BLE
        self.observed += other.observed

    def usage_LE(self) -> Tensor:
        """The share of tokens that chose each expert, float32; K/E where nothing was seen, and never quite 0 or 1."""
        top_k = self.pairs_LDEE[0, 0].diagonal().sum().item() / max(self.observed, 1)
        even = top_k / self.pairs_LDEE.shape[3]
        counts_LE = torch.stack([pairs_DEE[0].diagonal() for pairs_DEE in self.pairs_LDEE])
        return ((counts_LE.double() + even) / (self.observed + 1)).float()
