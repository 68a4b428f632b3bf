"""A causal transformer over tokens: what the whole routing of a sequence so far says about it, once per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from speculation.networks.layered import drop, gelu, table, unit
from speculation.networks.windowed_attention import Slopes, attend, geometric


class TokenContext(nn.Module):
    """Pre-norm blocks over tokens' embeddings (T, C); row t of the result has seen the tokens up to t itself."""

    def __init__(
        self, size: int, blocks: int, heads: int, window: int, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.slopes_H1 = tuple((slope,) for slope in geometric(0.002, 0.5, heads))
        self.blocks = nn.ModuleList(
            ContextBlock(size, self.slopes_H1, window, dropout, generator) for _ in range(blocks)
        )

    def stages(self) -> list[ContextBlock]:
        """The blocks in order."""
        return [cast(ContextBlock, block) for block in self.blocks]

    def forward(self, tokens_TC: Tensor, offsets: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """The context of each token, normalised, (T, C)."""
        for block in self.stages():
            tokens_TC = block(tokens_TC, offsets, generator)
        return unit(tokens_TC)


class ContextBlock(nn.Module):
    """Attention with distance penalties, then a GELU MLP of twice the width."""

    def __init__(self, size: int, slopes_H1: Slopes, window: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        heads = len(slopes_H1)
        self.heads, self.slopes_H1, self.window, self.dropout = heads, slopes_H1, window, dropout
        self.qkv_CX = table(generator, size, 3 * size, scale=size**-0.5)
        self.out_CC = table(generator, size, size, scale=0.5 * size**-0.5)
        self.up_CM = table(generator, size, 2 * size, scale=size**-0.5)
        self.down_MC = table(generator, 2 * size, size, scale=0.5 * (2 * size) ** -0.5)
        # Of unit queries and keys; starts between the flat 1/sqrt(d) and the sharp 1.
        self.sharpness_H = nn.Parameter(torch.full((heads,), math.log(4 * (size // heads) ** -0.25)))

    def project(self, tokens_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (heads, T, C / heads)."""
        qkv_TX = unit(tokens_TC) @ self.qkv_CX.to(tokens_TC.dtype)
        query, key, value = qkv_TX.view(len(tokens_TC), 3, self.heads, -1).permute(1, 2, 0, 3)
        return unit(query) * self.sharpness_H.exp().to(query.dtype)[:, None, None], unit(key), value

    def forward(self, tokens_TC: Tensor, offsets: Sequence[int], generator: torch.Generator | None) -> Tensor:
        query, key, value = self.project(tokens_TC)
        mixed_HTX = attend(query[:, None], key[:, None], value, offsets, self.slopes_H1, self.window)[:, 0]
        return self.finish(tokens_TC, mixed_HTX.transpose(0, 1).flatten(1), generator)

    def finish(self, tokens_TC: Tensor, mixed_TC: Tensor, generator: torch.Generator | None) -> Tensor:
        """Adds what attention found, then the MLP of the sum."""
        dtype = tokens_TC.dtype
        tokens_TC = tokens_TC + drop(mixed_TC @ self.out_CC.to(dtype), self.dropout, generator)
        inner_TM = gelu(unit(tokens_TC) @ self.up_CM.to(dtype))
        return tokens_TC + drop(inner_TM @ self.down_MC.to(dtype), self.dropout, generator)
