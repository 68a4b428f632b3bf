"""Where a training stands, and the checkpoint that holds it: weights, moments, averages and counters in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundwork.checkpoint import load_checkpoint, refuse_other_settings, save_checkpoint
from speculation.training.optimizer import MuonAdamW


@dataclass
class Progress:
    """The counters of a training; a step's randomness follows from `step`, so there is no generator to save."""

    step: int = 0
    epoch: int = 0
    piece: int = 0  # of this epoch, the first not yet used
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # since the last validation, loss times tokens
    loss_tokens: int = 0
    best_recall: float = -1.0
    best_step: int = 0
    stale: int = 0  # validations since the best
    micro_batch_tokens: int = 0


@dataclass
class Weights:
    """What training changes: the module, its optimizer, the running average if wanted, and the best weights so far."""

    module: nn.Module
    optimizer: MuonAdamW
    average: dict[str, Tensor] | None
    best: dict[str, Tensor]

    @torch.no_grad()
    def follow(self, decay: float, step: int) -> None:
        """Moves the average towards the module; early in training it forgets faster."""
        if self.average is not None:
            share = 1 - min(decay, (step + 1) / (step + 10))
            for name, parameter in self.module.named_parameters():
                self.average[name].lerp_(parameter, share)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges module and average; once more brings both back."""
        if self.average is not None:
            for name, parameter in self.module.named_parameters():
                kept = parameter.clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(kept)

    def keep_best(self) -> None:
        """Remembers the module's weights as the best."""
        self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}

    def save(self, path: Path, progress: Progress, identity: Mapping[str, Any]) -> None:
        """Writes the checkpoint, all of it or nothing."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average or {},
            "best": self.best,
        }
        tensors = {f"{part}.{name}": tensor for part, each in parts.items() for name, tensor in each.items()}
        save_checkpoint(path, tensors, {"progress": asdict(progress), "identity": dict(identity)})

    def load(self, path: Path, identity: Mapping[str, Any]) -> Progress:
        """Takes a checkpoint back; raises ConfigurationError when it is damaged or of other settings."""
        tensors, facts = load_checkpoint(path)
        refuse_other_settings(path, facts["identity"], identity)

        def part(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

        self.module.load_state_dict(part("module"))
        self.optimizer.load_state_dict(part("optimizer"))
        self.best = part("best")
        if self.average is not None:
            for name, tensor in part("average").items():
                self.average[name].copy_(tensor)
        return Progress(**facts["progress"])
