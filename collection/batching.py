"""Which sequences run through the model together: similar lengths, so that little is padding.

Results are written in the order of sequence ids, so those that finish early wait. To bound that wait, sequences are
sorted by length within a window of consecutive ones, and batches never cross windows.
"""

from collections.abc import Sequence

import torch

from groundwork.hardware import free_memory_bytes
from traces.schema import TraceSpec, decoded_bytes_per_token

WINDOW_BATCHES = 64  # sorting this many batches' worth leaves a few per cent of padding
WINDOW_BYTES = 256 * 2**20  # decoded routing that may wait

PRESETS = {"80 GB": (70e9, 65536), "48 GB": (40e9, 32768), "24 GB": (20e9, 16384)}
"""Cards by size: from how many free bytes on, and padded tokens per batch; about a quarter of a card for activations.

Mixtral-8x7B's widest layer takes some 0.25 MB a token in bfloat16: two experts' 2 x 14,336 gate and up values, their
products and outputs of 4,096, and the residual stream.
"""
SMALLEST_PRESET = 8192  # of CPUs and smaller cards


def preset_batch_tokens(*devices: torch.device) -> int:
    """Return the padded tokens of a batch on devices that hold a model together, by the least free memory."""
    free = min(free_memory_bytes(each) if each.type == "cuda" else 0 for each in devices)
    return next((tokens for least, tokens in PRESETS.values() if free >= least), SMALLEST_PRESET)


def window_tokens(spec: TraceSpec, batch_tokens: int) -> int:
    """Return how many tokens' routing may wait in memory to be written."""
    return max(min(WINDOW_BATCHES * batch_tokens, WINDOW_BYTES // decoded_bytes_per_token(spec)), 1)


def cut_batches(
    num_tokens_S: Sequence[int], *, window: int, batch_tokens: int, batch_size: int | None = None
) -> list[list[int]]:
    """Return batches as positions in `num_tokens_S`, each in rising order, the longest of a window first.

    A batch holds at most `batch_tokens` tokens with padding, or `batch_size` sequences where that is given; a window
    holds at most `window` tokens; a longer sequence is a batch, or window, of its own.
    """
    batches: list[list[int]] = []
    first, tokens = 0, 0
    for stop, own in enumerate([*num_tokens_S, None]):
        if own is None or (stop > first and tokens + own > window):
            batches += _cut_window(range(first, stop), num_tokens_S, batch_tokens, batch_size)
            first, tokens = stop, 0
        tokens += own or 0
    return batches


def padding_share(num_tokens_S: Sequence[int], batches: list[list[int]]) -> float:
    """Return the share of positions, over all batches, that are padding."""
    padded = sum(len(batch) * max(num_tokens_S[position] for position in batch) for batch in batches)
    return 1 - sum(num_tokens_S) / padded if padded else 0.0


def _cut_window(
    window: range, num_tokens_S: Sequence[int], batch_tokens: int, batch_size: int | None
) -> list[list[int]]:
    batches: list[list[int]] = []
    longest, limit = 0, 0
    for position in sorted(window, key=lambda position: (-num_tokens_S[position], position)):
        if not batches or len(batches[-1]) == limit:
            batches.append([])
            longest = num_tokens_S[position]
            limit = batch_size or max(batch_tokens // longest, 1)
        batches[-1].append(position)
    return [sorted(batch) for batch in batches]
