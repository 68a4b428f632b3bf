"""How a training runs: the size of its steps, the limits that end it, and the learning rate on the way there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundwork.errors import ConfigurationError
from speculation.training.epoch import Batching
from speculation.training.state import Progress

DEFAULT_EPOCHS = 10
BATCH_TOKENS = 320  # smaller steps learn more from each token
WARMUP_STEPS = 30
FINAL_RATE = 0.01  # of the learning rate, at the end


@dataclass(frozen=True)
class LoopSettings:
    """How to train; the first limit reached of epochs, steps and minutes ends it, 10 epochs where none is set.

    A step takes `batch_size * gradient_accumulation_steps` sequences (or pieces of long ones); without `batch_size`
    about `batch_tokens * gradient_accumulation_steps` tokens. `learning_rate` is AdamW's, and Muon's follows it.
    """

    batch_size: int | None = None
    batch_tokens: int | None = None
    gradient_accumulation_steps: int = 1
    epochs: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    learning_rate: float = 3e-3
    ema: float | None = None  # decay of an average of the weights, which is then what is kept
    patience: int = 6  # validations without a better one before training ends
    precision: str = "auto"
    memory_budget_gb: float = 24.0
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        counted = ("batch_size", "batch_tokens", "gradient_accumulation_steps", "epochs", "max_steps", "patience")
        for name in counted:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"--{name} {value}: must be at least 1")
        for name in ("max_minutes", "memory_budget_gb", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"--{name} {value}: must be above 0")
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ConfigurationError("--batch_size and --batch_tokens both say how large a step is; give one of them")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigurationError(f"--ema {self.ema}: must be between 0 and 1, like 0.999")

    @property
    def epoch_limit(self) -> int | None:
        """Passes over the data, where they are limited."""
        unlimited = self.epochs is None and self.max_steps is None and self.max_minutes is None
        return DEFAULT_EPOCHS if unlimited else self.epochs

    def share_done(self, progress: Progress, epoch_tokens: int) -> float:
        """Progress towards the nearest limit, 1 where it is reached."""
        limits = (
            (progress.tokens / epoch_tokens, self.epoch_limit),
            (progress.step, self.max_steps),
            (progress.seconds / 60, self.max_minutes),
        )
        return min(1.0, max(done / limit for done, limit in limits if limit is not None))

    def batching(self) -> Batching:
        """How sequences become steps."""
        return Batching(self.batch_size, self.batch_tokens or BATCH_TOKENS, self.gradient_accumulation_steps)


def rate(step: int, share: float) -> float:
    """The learning rate's factor: linear warm-up, then a cosine of the share done."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2)
