"""Causal attention over the tokens of packed sequences, with fixed distance penalties and a bounded window.

Each head lowers a score by its slope times the distance in tokens (as ALiBi does, arXiv 2108.12409), so heads look near
and far without position embeddings. Queries are worked through in chunks: memory grows with chunk times window, never
with the square of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

CHUNK_TOKENS = 128  # queries handled at once


Slopes = tuple[tuple[float, ...], ...]  # (N or 1, H), penalty per token of distance


def geometric(least: float, most: float, heads: int) -> tuple[float, ...]:
    """Slopes of heads that look ever nearer, from `least` to `most`; their geometric mean for one head."""
    if heads == 1:
        return (float(np.sqrt(least * most)),)
    return tuple(float(slope) for slope in np.geomspace(least, most, heads))


def attend(
    query_NHTD: Tensor, key_NHTD: Tensor, value_NTX: Tensor, offsets: Sequence[int], slopes_NH: Slopes, window: int
) -> Tensor:
    """Mixes the values of the last `window` tokens, its own among them, for each query: (N, H, T, X).

    N is a batch dimension with values of its own, H heads that share them; `offsets` bound the sequences along T.
    """
    rows, heads, _, size = query_NHTD.shape
    mixed = []
    for start, stop in pairwise(offsets):
        for first in range(start, stop, CHUNK_TOKENS):
            last = min(first + CHUNK_TOKENS, stop)
            oldest = max(start, first - window)
            query = query_NHTD[:, :, first:last].reshape(rows * heads, last - first, size)
            key = key_NHTD[:, :, oldest:last].reshape(rows * heads, last - oldest, size)
            scores = torch.bmm(query, key.transpose(1, 2)).view(rows, heads, last - first, last - oldest)
            penalty = _penalty(slopes_NH, first - oldest, window, scores.dtype, scores.device)
            share = torch.softmax(scores.add_(penalty[..., : last - first, : last - oldest]), dim=-1)
            values = torch.bmm(share.flatten(1, 2), value_NTX[:, oldest:last])
            mixed.append(values.view(rows, heads, last - first, -1))
    return torch.cat(mixed, dim=2)


@lru_cache(maxsize=32)
def _penalty(slopes_NH: Slopes, before: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores, (N or 1, H, C, before + C); -inf for tokens to come and those out of the window."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        query_C1 = torch.arange(CHUNK_TOKENS, device=device)[:, None] + before
        gap_CX = query_C1 - torch.arange(before + CHUNK_TOKENS, device=device)
        penalty = -torch.tensor(slopes_NH, device=device)[..., None, None] * gap_CX
        return penalty.masked_fill_((gap_CX < 0) | (gap_CX >= window), -torch.inf).to(dtype)
