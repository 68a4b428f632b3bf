"""Copy attention: what did this layer choose at earlier tokens where the evidence looked like it does now?

Each layer compares its evidence for the present token with that for every earlier token of the sequence (one projection
for both sides) and mixes the sets it then chose: an induction head over routing (Olsson et al., arXiv 2209.11895). The
first key of a sequence is a learned one with an empty set, for evidence that resembles none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speculation.networks.layered import table, token_before, unit
from speculation.networks.windowed_attention import attend, geometric


class CopyAttention(nn.Module):
    """Heads of copy attention, with weights of their own for each layer."""

    def __init__(
        self, layers: int, hidden: int, heads: int, key_size: int, window: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.heads, self.key_size, self.window = heads, key_size, window
        self.slopes_H = geometric(0.001, 0.06, heads)
        self.key_LDX = table(generator, layers, hidden, heads * key_size, scale=hidden**-0.5)
        self.sharpness_LH = nn.Parameter(torch.ones(layers, heads))  # of the softmax, as a logarithm
        self.empty_LHD = nn.Parameter(torch.zeros(layers, heads, key_size))

    def keys(self, evidence_LTD: Tensor) -> Tensor:
        """Evidence as unit keys, (L, T, H, key_size)."""
        keys_LTX = torch.bmm(unit(evidence_LTD), self.key_LDX.to(evidence_LTD.dtype))
        return unit(keys_LTX.unflatten(2, (self.heads, self.key_size)))

    def forward(self, evidence_LTD: Tensor, before_LTE: Tensor, offsets: Sequence[int], starts_S: Tensor) -> Tensor:
        """The mixed sets (L, H, T, E); `before_LTE` are the sets chosen at the token before."""
        dtype = evidence_LTD.dtype
        key_LTHD = self.keys(evidence_LTD)
        query_LTHD = key_LTHD * self.sharpness_LH.exp().to(dtype)[:, None, :, None]
        # Row t holds the key and the set of token t - 1, so that attention up to row t sees earlier tokens only.
        past_LTX = token_before(key_LTHD.flatten(2), starts_S)
        first_T1 = torch.zeros(past_LTX.shape[1], 1, dtype=dtype, device=past_LTX.device).index_fill_(0, starts_S, 1.0)
        past_LTX = past_LTX + first_T1 * unit(self.empty_LHD.to(dtype)).flatten(1)[:, None]
        past_LTHD = past_LTX.view_as(key_LTHD)
        return attend(
            query_LTHD.transpose(1, 2), past_LTHD.transpose(1, 2), before_LTE, offsets, (self.slopes_H,), self.window
        )
