"""Runs the planned batches through the model, while a thread beside it writes the shards.

A batch that does not fit in memory is halved, by sequences, until it does; the shard's manifest line says so, because
equal values are promised for equal batches only. Signals are heeded between batches: the batch is finished, the shard
under way is discarded, and no shard is left half listed.
"""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from collection.output import LOCAL, Output
from collection.plan import Layout
from collection.running import BatchRunner, is_out_of_memory, release_memory
from collection.tokens import TokenText
from collection.writing import Routed, write_shards
from groundwork.background import Background
from groundwork.errors import ExpertSpeculationError
from groundwork.interrupt import finishing_steps
from groundwork.progress import log
from moe.passes import BatchRouting
from traces.plan import Plan


def trace_shards(
    run_dir: Path,
    plan: Plan,
    layout: Layout,
    finished: set[int],
    runner: BatchRunner,
    text: TokenText,
    output: Output = LOCAL,
) -> None:
    """Write every shard that is not `finished`; the caller holds the folder.

    Raises KeyboardInterrupt between two batches once a signal has come, and ExpertSpeculationError where a single
    sequence does not fit in memory.
    """
    shard_of = plan.sequences["shard"].to_numpy()
    batches = {
        plan.shards[int(index)]: list(group)
        for index, group in groupby(layout.batches, key=lambda batch: shard_of[batch[0]])
        if index not in finished
    }
    bar = output.bar(sum(shard.num_tokens for shard in batches), "token", 0)
    write = partial(write_shards, run_dir, plan.spec, list(batches), layout, text, output=output)
    with bar, finishing_steps() as step_done, Background(write) as writing:
        for shard, own in batches.items():
            for batch in own:
                step_done()
                parts = []
                for sequence_ids, routing in _route(batch, layout, runner):
                    parts.append((sequence_ids, routing))
                    bar.update(sum(layout.num_tokens_S[each] for each in sequence_ids))
                note = None
                if len(parts) > 1:
                    note = (
                        f"out of memory: the batch of {len(batch)} sequences from sequence {batch[0]} on ran as "
                        + " + ".join(str(len(sequence_ids)) for sequence_ids, _ in parts)
                    )
                    log(f"{shard.name}: {note}; lower --batch_tokens or --batch_size in the next run")
                writing.put(Routed(parts, note))


def _route(batch: list[int], layout: Layout, runner: BatchRunner) -> Iterator[tuple[list[int], BatchRouting]]:
    """Run one batch and yield it with its routing; where memory does not suffice, in parts."""
    routing = None
    try:
        routing = runner.run(batch, [layout.sequences[sequence_id] for sequence_id in batch])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ExpertSpeculationError(
                f"sequence {batch[0]} alone, {layout.num_tokens_S[batch[0]]} tokens, does not fit in memory beside the "
                f"model on {runner.device}; free memory and run again with --resume, or lower --max_length in a new run"
            ) from error
    if routing is not None:
        yield batch, routing
        return
    release_memory()
    half = len(batch) // 2
    for part in (batch[:half], batch[half:]):
        yield from _route(part, layout, runner)
