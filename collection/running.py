"""Runs one batch of sequences through the traced model: given texts, or prompts that the model continues.

A model that decodes draws its random numbers per sequence, from the run's seed and the sequence's id alone, so neither
batches nor resuming change what it writes.
"""

import gc
from collections.abc import Sequence as Items

import numpy as np
import torch

from collection.hidden import HiddenSample
from collection.sampling import Sequence
from moe.decoding import Decoder
from moe.passes import BatchRouting
from moe.resident import ResidentTracer

# What a RuntimeError says where torch has no class for it: CPU, MPS and pinned allocations, cuBLAS work space.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class BatchRunner:
    """Traces batches with `tracer`, which stays in the caller's context.

    `new_tokens` are decoded after each prompt; the tokens of `hidden` come with their router inputs.
    """

    def __init__(
        self,
        tracer: ResidentTracer,
        *,
        new_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        hidden: HiddenSample | None = None,
    ) -> None:
        self.device = tracer.model.device
        self._tracer = tracer
        self._new_tokens, self._seed, self._hidden = new_tokens, seed, hidden
        self._decoder = Decoder(tracer, new_tokens, temperature) if new_tokens else None

    def run(self, sequence_ids: Items[int], sequences: Items[Sequence]) -> BatchRouting:
        """Return the routing of one batch."""
        input_ids_BT, lengths_B = pad(sequences)
        hidden_BX = self._mark_hidden(sequence_ids, lengths_B, input_ids_BT.shape[1])
        if self._decoder is None:
            return self._tracer.trace(input_ids_BT, lengths_B, hidden_BX)
        draws_BN = np.stack(
            [np.random.default_rng([self._seed, each]).random(self._new_tokens) for each in sequence_ids]
        )
        return self._decoder.trace(input_ids_BT, lengths_B, torch.from_numpy(draws_BN), hidden_BX)

    def _mark_hidden(self, sequence_ids: Items[int], lengths_B: torch.Tensor, width: int) -> torch.Tensor | None:
        """Return where, in the batch as it is padded, the tokens are whose router inputs are wanted."""
        if self._hidden is None:
            return None
        first_B = width - lengths_B if self._decoder else None  # prompts are padded on the left
        return mark(self._hidden, sequence_ids, width + self._new_tokens, first_B)


def pad(sequences: Items[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids [B, T], padded on the right, and lengths [B]."""
    lengths_B = torch.tensor([len(sequence.token_ids_T) for sequence in sequences])
    input_ids_BT = torch.zeros(len(sequences), int(lengths_B.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids_BT[row, : lengths_B[row]] = torch.from_numpy(sequence.token_ids_T)
    return input_ids_BT, lengths_B


def mark(
    hidden: HiddenSample, sequence_ids: Items[int], width: int, first_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Return where, in a batch `width` wide whose rows begin at `first_B`, the sampled tokens are."""
    marked_BX = torch.zeros(len(sequence_ids), width, dtype=torch.bool)
    for row, each in enumerate(sequence_ids):
        first = 0 if first_B is None else int(first_B[row])
        marked_BX[row, torch.from_numpy(hidden.positions(each)) + first] = True
    return marked_BX


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory did not suffice, of whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back what a failed attempt held; call it outside of `except`, for the error holds the attempt's frames."""
    gc.collect()
    torch.cuda.empty_cache()
