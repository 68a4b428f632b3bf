import math
from itertools import pairwise

import pytest
import torch

from speculation.networks.windowed_attention import CHUNK_TOKENS, attend


def plainly(query, key, value, offsets, slopes, window):  # type: ignore[no-untyped-def]
    """The same, one query at a time."""
    rows, heads, tokens, _ = query.shape
    out = torch.zeros(rows, heads, tokens, value.shape[2])
    for start, stop in pairwise(offsets):
        for t in range(start, stop):
            seen = range(max(start, t - window + 1), t + 1)
            for n in range(rows):
                for h in range(heads):
                    slope = slopes[n if len(slopes) > 1 else 0][h]
                    scores = torch.stack([query[n, h, t] @ key[n, h, j] - slope * (t - j) for j in seen])
                    out[n, h, t] = scores.softmax(0) @ value[n, list(seen)]
    return out


@pytest.mark.parametrize("lengths", [[3, 9], [1, CHUNK_TOKENS + 7]])
@pytest.mark.parametrize("window", [4, CHUNK_TOKENS, 1000])
@pytest.mark.parametrize("slopes", [((0.1, 0.01),), ((0.1, 0.3), (0.0, 0.02))])
def test_attention_equals_its_definition_across_chunks_sequences_and_windows(
    lengths: list[int], window: int, slopes: tuple[tuple[float, ...], ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = [0, lengths[0], sum(lengths)]
    query, key = (torch.randn(2, 2, offsets[-1], 4, generator=generator) for _ in range(2))
    value = torch.randn(2, offsets[-1], 3, generator=generator)
    mixed = attend(query, key, value, offsets, slopes, window)
    torch.testing.assert_close(mixed, plainly(query, key, value, offsets, slopes, window), atol=1e-5, rtol=1e-4)


def test_a_penalty_made_while_scoring_can_be_used_in_training() -> None:
    query = torch.ones(1, 1, 2, 1)
    with torch.inference_mode():
        attend(query, query, query[0], [0, 2], ((math.pi,),), 8)
    trained = query.clone().requires_grad_()
    attend(trained, trained, query[0], [0, 2], ((math.pi,),), 8).sum().backward()
    assert trained.grad is not None
