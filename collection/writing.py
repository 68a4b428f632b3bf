"""Writes routed batches as shards, in a thread beside the model: cut into sequences, put in order, compressed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from collection.output import LOCAL, Output
from collection.plan import Layout
from collection.tokens import TokenText
from moe.passes import BatchRouting
from traces.plan import PlannedShard
from traces.schema import PHASES, SequenceTrace, TraceSpec
from traces.writer import ShardWriter


class Routed(NamedTuple):
    """What came of one planned batch: its parts with their sequence ids (several where memory did not suffice)."""

    parts: list[tuple[list[int], BatchRouting]]
    note: str | None = None


def write_shards(
    run_dir: Path,
    spec: TraceSpec,
    shards: list[PlannedShard],
    layout: Layout,
    text: TokenText,
    batches: Iterator[Routed],
    output: Output = LOCAL,
) -> None:
    """Write `shards` from their batches, each sequence as soon as its turn comes; the caller holds the folder.

    An error in `batches` discards the shard under way.
    """
    for shard in shards:
        waiting: dict[int, SequenceTrace] = {}  # bounded by the windows that batches are cut from
        due, withheld = shard.first_sequence, 0
        notes: list[str] = []
        with ShardWriter(run_dir, spec, shard, attempt=output.attempt) as writer:
            while due < shard.stop_sequence:
                batch = next(batches)
                notes += [batch.note] if batch.note else []
                for sequence_ids, routing in batch.parts:
                    withheld += 0 if routing.withheld_B is None else int(routing.withheld_B.sum())
                    for sequence in _cut(sequence_ids, routing, layout, spec, text):
                        waiting[sequence.sequence_id] = sequence
                while due in waiting:
                    writer.write(waiting.pop(due))
                    due += 1
            if withheld:
                count = shard.stop_sequence - shard.first_sequence
                notes.append(
                    f"generation: {withheld} of {count} sequences would have ended earlier; the tokens that end a text "
                    "were withheld"
                )
            output.commit(writer, notes)


def _cut(
    sequence_ids: list[int], routing: BatchRouting, layout: Layout, spec: TraceSpec, text: TokenText
) -> Iterator[SequenceTrace]:
    """Yield the sequences of a batch, cut to their lengths."""
    for row, sequence_id in enumerate(sequence_ids):
        sequence = layout.sequences[sequence_id]
        token_ids_T, phase_T = sequence.token_ids_T, np.full(len(sequence.token_ids_T), PHASES["prefill"], np.uint8)
        if routing.decoded_BN is not None:
            decoded_N = routing.decoded_BN[row].numpy().astype(np.int32)
            token_ids_T = np.concatenate([token_ids_T, decoded_N])
            phase_T = np.concatenate([phase_T, np.full(len(decoded_N), PHASES["decode"], np.uint8)])
        first = int(routing.first_B[row])
        own = slice(first, first + len(token_ids_T))

        def cut(array_BT: torch.Tensor | None, row: int = row, own: slice = own) -> NDArray[Any] | None:
            # A copy, so that a sequence that waits to be written does not keep its whole batch in memory.
            return None if array_BT is None else array_BT[row, own].numpy().copy()

        ids_TLK = cut(routing.expert_ids_BTLK)
        assert ids_TLK is not None
        yield SequenceTrace(
            dataset=sequence.dataset,
            sequence_id=sequence_id,
            sequence_key=sequence.key,
            token_ids_T=token_ids_T,
            tokens_T=text.strings(token_ids_T.tolist()),
            phase_T=phase_T,
            expert_ids_TLK=ids_TLK.astype(spec.id_dtype),
            routing_weights_TLK=cut(routing.routing_weights_BTLK) if "weights" in spec.store else None,
            router_logits_TLE=cut(routing.router_logits_BTLE),
            lookahead_logits_THLE=cut(routing.lookahead_logits_BTHLE),
            **_hidden(routing, row, first),
        )


def _hidden(routing: BatchRouting, row: int, first: int) -> dict[str, NDArray[Any]]:
    """Return the router inputs of one sequence with their positions, in order; nothing where they are not stored."""
    if routing.hidden_at_M2 is None or routing.router_input_MLD is None:
        return {}
    own = (routing.hidden_at_M2[:, 0] == row).nonzero().squeeze(1)
    positions_N, order_N = (routing.hidden_at_M2[own, 1] - first).sort()
    return {
        "hidden_positions_N": positions_N.numpy(),
        "router_input_NLD": routing.router_input_MLD[own[order_N]].numpy(),
    }
