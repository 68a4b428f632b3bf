"""What neural predictors share: a torch module that scores packed sequences, and how it is scored within memory.

Training is speculation.training.loop's; this file is the contract between the two.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from speculation.counted import RoutingCounts
from speculation.features import RoutingBatch
from speculation.predictor import Predictor, RoutingShape
from traces.reader import TraceDataset

SCORE_TOKENS = 2048  # tokens scored at once; fixed, so that scores do not depend on a machine's memory


class NeuralPredictor(Predictor):
    """A predictor whose fitted state is a torch module; built by `build`, trained by speculation.training.

    `longest_piece`: in training, a longer sequence is cut into equal pieces of at most so many tokens, each of which
    starts afresh; None cuts nothing.
    """

    longest_piece: int | None = None
    learns_from: frozenset[str] = frozenset()  # columns that only the loss reads, where they are there

    def __init__(self) -> None:
        super().__init__()
        self.module_: nn.Module | None = None
        self.device = torch.device("cpu")

    @abstractmethod
    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        """A new module for this shape with seeded weights, started from counts where they are given."""

    @abstractmethod
    def logits(self, batch: RoutingBatch, horizon: int, generator: torch.Generator | None) -> Tensor:
        """Scores (T, L, E) of whole sequences on the module's device; a generator there turns training noise on.

        Training may call it under autocast.
        """

    @abstractmethod
    def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
        """The mean loss over tokens and layers, from float32 logits."""

    @abstractmethod
    def training_bytes_per_token(self, shape: RoutingShape) -> int:
        """Estimated bytes that a token takes in training: its features, and what is kept for the backward pass."""

    def sample_horizon(self, generator: torch.Generator) -> int:
        """The horizon of one training step; 1 unless the predictor serves several."""
        return 1

    def muon_parameters(self, module: nn.Module) -> list[str]:
        """Names of the matrices, or batches of matrices, that Muon trains; AdamW trains the rest."""
        return []

    def to(self, device: torch.device | str) -> Self:
        """Moves the module; scores are returned on the CPU all the same."""
        self.device = torch.device(device)
        if self.module_ is not None:
            self.module_.to(self.device)
        return self

    def fit(
        self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = (), **limits: Any
    ) -> Self:
        """Trains in memory-bounded steps without leaving files; `limits` are fields of loop.LoopSettings."""
        from speculation.training.loop import LoopSettings, fit_module
        from speculation.training.view import TrainingView

        self.check_columns(dataset, "the traces")
        fit_module(self, TrainingView(dataset, hold_out=hold_out), LoopSettings(**limits), split=split)
        return self

    @torch.inference_mode()
    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        if self.module_ is None:
            raise ValueError(f"{self.name} has not been fitted")
        self.check_horizon(batch, horizon)
        self.module_.eval()
        groups = sequence_groups(batch, SCORE_TOKENS)
        return torch.cat([self.logits(group.to(self.device), horizon, None).float().cpu() for group in groups])

    def state(self) -> dict[str, Tensor]:
        if self.module_ is None:
            raise ValueError(f"{self.name} has not been fitted")
        return saved_precision(self.module_.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.shape_ is None:
            raise ValueError(f"{self.name} has no shape yet")
        self.module_ = self.build(self.shape_, torch.Generator().manual_seed(0))
        self.module_.load_state_dict(state)
        self.module_.to(self.device).eval()


def saved_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as predictors are saved: matrices as float16. Training rounds its result so, and saving loses nothing."""
    return {
        name: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }


def sequence_groups(batch: RoutingBatch, max_tokens: int) -> Iterator[RoutingBatch]:
    """Cuts a batch between sequences into batches of at most `max_tokens` tokens; a longer sequence stands alone."""
    offsets = batch.offsets.tolist()
    first = 0
    for last in range(1, len(offsets)):
        if last + 1 == len(offsets) or offsets[last + 1] - offsets[first] > max_tokens:
            yield _sequences(batch, first, last)
            first = last


def _sequences(batch: RoutingBatch, first: int, last: int) -> RoutingBatch:
    if (first, last) == (0, len(batch.offsets) - 1):
        return batch
    offsets = batch.offsets[first : last + 1]
    rows = slice(int(offsets[0]), int(offsets[-1]))
    kept: dict[str, Any] = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **{**kept, "offsets": offsets - offsets[0]})
