"""What neural predictors share: features once per packed batch, scores and losses over slices of its tokens.

Work on a slice depends on the slice alone, so memory is bounded by slice length whatever the batch, and gradients add
up to the batch's to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from speculation.counted import RoutingCounts
from speculation.features import RoutingBatch
from speculation.predictor import Predictor, RoutingShape
from traces.reader import TraceDataset

SCORE_TOKENS = 2048  # tokens scored at once; fixed, so that scores do not depend on a machine's memory


class NeuralPredictor(Predictor):
    """A predictor whose fitted state is a torch module; built by `build`, trained by speculation.loop."""

    def __init__(self) -> None:
        super().__init__()
        self.module_: nn.Module | None = None
        self.device = torch.device("cpu")

    @abstractmethod
    def build(self, shape: RoutingShape, generator: torch.Generator, counts: RoutingCounts | None = None) -> nn.Module:
        """A new module for this shape with seeded weights, started from counts where they are given."""

    @abstractmethod
    def features(self, batch: RoutingBatch) -> tuple[Tensor, ...]:
        """What the module reads, one row per token in each tensor, on the batch's device."""

    @abstractmethod
    def logits(self, features: tuple[Tensor, ...], horizon: int, generator: torch.Generator | None) -> Tensor:
        """Scores (T, L, E) of a slice of features; a generator turns training noise on."""

    @abstractmethod
    def loss(self, logits_TLE: Tensor, expert_ids_TLK: Tensor) -> Tensor:
        """The mean loss over tokens and layers."""

    @abstractmethod
    def training_bytes_per_token(self, shape: RoutingShape) -> tuple[int, int]:
        """Estimated bytes a token takes in training: in the features of a batch, and in the slice being worked on."""

    def sample_horizon(self, generator: torch.Generator) -> int:
        """The horizon of one training step; 1 unless the predictor serves several."""
        return 1

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
        from speculation.loop import LoopSettings, fit_module

        fit_module(self, dataset, LoopSettings(**limits), split=split, hold_out=hold_out)
        return self

    @torch.inference_mode()
    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        if self.module_ is None:
            raise ValueError(f"{self.name} has not been fitted")
        self.check_horizon(batch, horizon)
        self.module_.eval()
        features = self.features(batch.to(self.device))
        parts = [
            self.logits(tuple(feature[start : start + SCORE_TOKENS] for feature in features), horizon, None)
            .float()
            .cpu()
            for start in range(0, batch.num_tokens, SCORE_TOKENS)
        ]
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        if self.module_ is None:
            raise ValueError(f"{self.name} has not been fitted")
        return dict(self.module_.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.shape_ is None:
            raise ValueError(f"{self.name} has no shape yet")
        self.module_ = self.build(self.shape_, torch.Generator().manual_seed(0))
        self.module_.load_state_dict(state)
        self.module_.to(self.device).eval()
