"""Takes one batch through one layer of a streamed model; in parts, by sequences, where memory does not suffice."""

import torch

from collection.hidden import HiddenSample
from collection.plan import Layout
from collection.running import is_out_of_memory, mark, pad, release_memory
from groundwork.errors import ExpertSpeculationError
from groundwork.progress import log
from moe.streaming.captured import join
from moe.streaming.tracer import StreamedTracer

Part = tuple[torch.Tensor, dict[str, torch.Tensor]]


class LayerRunner:
    """Runs the batches of `layout`, by number, with `tracer`; the tokens of `hidden` come with their router inputs.

    `notes` says, by batch, where one did not run as planned.
    """

    def __init__(self, tracer: StreamedTracer, layout: Layout, hidden: HiddenSample | None) -> None:
        self._tracer, self._layout, self._hidden = tracer, layout, hidden
        self.notes: dict[int, str] = {}

    def run(self, index: int, number: int, before: torch.Tensor | None) -> Part:
        """Return hidden states and what the router showed; raises ExpertSpeculationError where no sequence fits."""
        batch = self._layout.batches[number]
        input_ids_BT, lengths_B = pad([self._layout.sequences[each] for each in batch])
        marked_BT = mark(self._hidden, batch, input_ids_BT.shape[1]) if self._hidden else None
        parts = self._parts(index, batch, input_ids_BT, lengths_B, before, marked_BT)
        if len(parts) == 1:
            return parts[0]
        if number not in self.notes:
            self.notes[number] = (
                f"out of memory: the batch of {len(batch)} sequences from sequence {batch[0]} on ran in parts, from "
                f"layer {index} on or in that layer alone"
            )
            log(f"{self.notes[number]}; lower --batch_tokens or --batch_size in the next run")
        return torch.cat([after for after, _ in parts]), join([(len(after), shown) for after, shown in parts])

    def _parts(
        self,
        index: int,
        batch: list[int],
        input_ids_BT: torch.Tensor,
        lengths_B: torch.Tensor,
        before: torch.Tensor | None,
        marked_BT: torch.Tensor | None,
    ) -> list[Part]:
        """Run some sequences of a batch, padded as the whole batch is."""
        try:
            return [self._tracer.run(index, input_ids_BT, lengths_B, before, marked_BT)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ExpertSpeculationError(
                    f"sequence {batch[0]} alone, padded to {input_ids_BT.shape[1]} tokens, does not fit in memory "
                    f"beside two layers on {self._tracer.layered.device}; free memory and run again with --resume, or "
                    "lower --max_length in a new run"
                ) from error
        release_memory()
        half = len(batch) // 2
        return [
            part
            for rows in (slice(half), slice(half, None))
            for part in self._parts(
                index,
                batch[rows],
                input_ids_BT[rows],
                lengths_B[rows],
                None if before is None else before[rows],
                None if marked_BT is None else marked_BT[rows],
            )
        ]
