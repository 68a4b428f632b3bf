"""Passes: some whole shards each, which go through a streamed model's layers together."""

from collections.abc import Iterable

from traces.plan import PlannedShard

PASS_TOKENS = 2**19
"""From here on reading the weights costs little beside computing. Mixtral-8x7B in bfloat16: 93 GB, half a minute from a
disk of 3 GB/s, and some 25 GFLOP a token, three minutes at 70 TFLOP/s."""
BLOCK_TOKENS = 2**14  # padded; the batches whose tensors share a file, and are in memory beyond the budget
SHARE_FOR_STATES = 0.5  # of the host memory that is free once the model has been looked through


def cut_passes(shards: Iterable[PlannedShard], tokens: int) -> list[list[PlannedShard]]:
    """Return consecutive shards together, of at most so many tokens, but at least one shard each."""
    passes: list[list[PlannedShard]] = []
    left = 0
    for shard in shards:
        if not passes or shard.num_tokens > left:
            passes.append([])
            left = tokens
        passes[-1].append(shard)
        left -= shard.num_tokens
    return passes
