"""Attention over the layers of one token: position l looks at positions up to l, whose evidence is never newer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from speculation.networks.layered import table, unit


class LayerAttention(nn.Module):
    """One attention with weights shared by all layers; layers tell themselves apart by their own tables before it."""

    def __init__(self, hidden: int, heads: int, generator: Generator) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_DX = table(generator, hidden, 3 * hidden, scale=hidden**-0.5)
        self.out_DD = table(generator, hidden, hidden, scale=0.5 * hidden**-0.5)

    def project(self, hidden_LTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (T, heads, L, D / heads)."""
        qkv = unit(hidden_LTD) @ self.qkv_DX.to(hidden_LTD.dtype)
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 1, 3, 0, 4)
        return query, key, value

    def forward(self, hidden_LTD: Tensor) -> Tensor:
        query, key, value = self.project(hidden_LTD)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2) @ self.out_DD.to(hidden_LTD.dtype)
