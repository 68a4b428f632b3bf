"""Runs the planned batches through the model and writes the unfinished shards.

A batch that does not fit in memory is halved, by sequences, until it does; the shard's manifest line says so, because
equal values are promised for equal batches only. Signals are heeded between batches: the batch is finished, the shard
under way is discarded, and no shard is left half listed.
"""

import gc
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collection.plan import Layout
from collection.sampling import Sequence
from collection.tokens import TokenText
from groundwork.errors import ExpertSpeculationError
from groundwork.interrupt import finishing_steps
from groundwork.progress import Progress, log, progress
from moe.resident import BatchRouting, ResidentTracer
from traces.plan import Plan
from traces.schema import PHASES, SequenceTrace, TraceSpec
from traces.writer import ShardWriter

# What a RuntimeError says where torch has no class for it: CPU, MPS and pinned allocations, cuBLAS work space.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def trace_shards(
    run_dir: Path, plan: Plan, layout: Layout, finished: set[int], tracer: ResidentTracer, text: TokenText
) -> None:
    """Write every shard that is not `finished`, each sequence as soon as its turn comes; the caller holds the folder.

    Raises KeyboardInterrupt between two batches once a signal has come, and ExpertSpeculationError where a single
    sequence does not fit in memory.
    """
    shard_of = plan.sequences["shard"].to_numpy()
    batches = {
        plan.shards[int(index)]: list(group)
        for index, group in groupby(layout.batches, key=lambda batch: shard_of[batch[0]])
        if index not in finished
    }
    bar: Progress[None] = progress(
        total=sum(shard.num_tokens for shard in batches), description="tracing", unit="token"
    )
    with bar, finishing_steps() as step_done:
        for shard, own in batches.items():
            waiting: dict[int, SequenceTrace] = {}  # bounded by the windows that batches are cut from
            due = shard.first_sequence
            notes = []
            with ShardWriter(run_dir, plan.spec, shard) as writer:
                for batch in own:
                    step_done()
                    parts = []
                    for part, routing in _route(batch, layout, tracer):
                        parts.append(len(part))
                        for sequence in _cut(part, routing, layout, plan.spec, text):
                            waiting[sequence.sequence_id] = sequence
                            bar.update(sequence.num_tokens)
                    if len(parts) > 1:
                        notes.append(
                            f"out of memory: the batch of {len(batch)} sequences from sequence {batch[0]} on ran as "
                            + " + ".join(map(str, parts))
                        )
                        log(f"{shard.name}: {notes[-1]}; lower --batch_tokens or --batch_size in the next run")
                    while due in waiting:
                        writer.write(waiting.pop(due))
                        due += 1
                writer.commit(notes)


def _route(batch: list[int], layout: Layout, tracer: ResidentTracer) -> Iterator[tuple[list[int], BatchRouting]]:
    """Run one right-padded batch and yield it with its routing; where memory does not suffice, in parts."""
    chosen = [layout.sequences[sequence_id] for sequence_id in batch]
    lengths_B = torch.tensor([len(sequence.token_ids_T) for sequence in chosen])
    input_ids_BT = torch.zeros(len(chosen), int(lengths_B.max()), dtype=torch.long)
    for row, sequence in enumerate(chosen):
        input_ids_BT[row, : lengths_B[row]] = torch.from_numpy(sequence.token_ids_T)
    routing = None
    try:
        routing = tracer.trace(input_ids_BT, lengths_B)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ExpertSpeculationError(
                f"sequence {batch[0]} alone, {int(lengths_B[0])} tokens, does not fit in memory beside the model on "
                f"{tracer.model.device}; free memory and run again with --resume, or lower --max_length in a new run"
            ) from error
    if routing is not None:
        yield batch, routing
        return
    gc.collect()  # outside of `except`: the error holds the frames, and so the tensors, of the attempt
    torch.cuda.empty_cache()
    half = len(batch) // 2
    for part in (batch[:half], batch[half:]):
        yield from _route(part, layout, tracer)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory did not suffice, of whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


def _cut(
    batch: list[int], routing: BatchRouting, layout: Layout, spec: TraceSpec, text: TokenText
) -> Iterator[SequenceTrace]:
    """Yield the sequences of a batch, cut to their lengths."""
    for row, sequence_id in enumerate(batch):
        sequence: Sequence = layout.sequences[sequence_id]
        tokens = len(sequence.token_ids_T)

        def cut(array_BT: torch.Tensor | None, row: int = row, tokens: int = tokens) -> NDArray[Any] | None:
            # A copy, so that a sequence that waits to be written does not keep its whole batch in memory.
            return None if array_BT is None else array_BT[row, :tokens].numpy().copy()

        ids_TLK = cut(routing.expert_ids_BTLK)
        assert ids_TLK is not None
        yield SequenceTrace(
            dataset=sequence.dataset,
            sequence_id=sequence_id,
            sequence_key=sequence.key,
            token_ids_T=sequence.token_ids_T,
            tokens_T=text.strings(sequence.token_ids_T.tolist()),
            phase_T=np.full(tokens, PHASES["prefill"], np.uint8),
            expert_ids_TLK=ids_TLK.astype(spec.id_dtype),
            routing_weights_TLK=cut(routing.routing_weights_BTLK) if "weights" in spec.store else None,
            router_logits_TLE=cut(routing.router_logits_BTLE),
            lookahead_logits_THLE=cut(routing.lookahead_logits_BTHLE),
        )
