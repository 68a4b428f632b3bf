"""What a simulation is told, checked when the settings are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundwork.errors import ConfigurationError
from prefetch.simulation import POLICIES

LAYOUTS = ("pooled", "per_layer")
SWEEP_TOKENS = 4096
MOST_US = 1_000_000_000  # of a prediction, so that a run's nanoseconds stay within 64 bits


@dataclass(frozen=True)
class SimulateSettings:
    """Options of one simulation; raises ConfigurationError for values that can not be meant.

    `cache_experts` counts experts over all layers, or is a share of them such as "25%", or memory such as "12GB"; None
    is what the hardware has room for. `ram_experts` likewise, for RAM. `policies` is empty where the program chooses.
    `budget` guesses of each sequence are prefetched, K where that is None, as far as they are at least `threshold`
    likely: by default, more likely than not. `prediction_us` is what a prediction costs: microseconds, "measure", or
    None for what is documented of a predictor.
    """

    split: str = "test"
    precision: str | None = None
    cache_experts: str | None = None
    ram_experts: str | None = None
    cache_layout: str = "pooled"
    policies: tuple[str, ...] = ()
    horizon: int = 1
    budget: int | None = None
    threshold: float = 0.5
    batch_size: int = 1
    prediction_us: str | None = None
    sweep_tokens: int = SWEEP_TOKENS
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("horizon", "budget", "batch_size", "bootstrap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"--{name} {value}: must be at least 1; give a larger number")
        if self.sweep_tokens < 0:
            raise ConfigurationError(
                f"--sweep_tokens {self.sweep_tokens}: must not be negative; 0 leaves the sweep out"
            )
        if self.seed < 0:
            raise ConfigurationError(f"--seed {self.seed}: must not be negative; give 0 or more")
        if not 0 <= self.threshold <= 1:
            raise ConfigurationError(f"--threshold {self.threshold:g}: is a probability; give a number from 0 to 1")
        for policy in self.policies:
            if policy not in POLICIES:
                raise ConfigurationError(f"--policy {policy}: unknown; choose among {', '.join(POLICIES)}")
        if self.cache_layout not in LAYOUTS:
            raise ConfigurationError(f"--cache_layout {self.cache_layout}: unknown; use {' or '.join(LAYOUTS)}")
        if self.prediction_us not in (None, "measure"):
            self.prediction_ns()

    def prediction_ns(self) -> int | None:
        """Return the cost given as a number; None where it is to be looked up or measured."""
        if self.prediction_us in (None, "measure"):
            return None
        try:
            value = float(str(self.prediction_us))
        except ValueError:
            value = math.nan
        if not 0 <= value <= MOST_US:
            raise ConfigurationError(
                f"--prediction_us {self.prediction_us}: give microseconds per prediction, 0 to {MOST_US:,}, "
                "or 'measure'"
            )
        return round(value * 1000)


def experts_counted(option: str, value: str, everything: int, expert_bytes: int) -> int:
    """Return a number of experts given as such, as a share with '%', or as memory with 'GB' (10**9 bytes).

    Memory for more than all of them is all of them. Raises ConfigurationError for anything else.
    """
    unit = next((unit for unit in ("%", "GB") if value.endswith(unit)), "")
    each = {"%": everything / 100, "GB": 1e9 / expert_bytes, "": 1.0}[unit]
    try:
        number = float(value.removesuffix(unit)) * each
    except ValueError:
        number = math.nan
    if unit == "GB":
        number = min(number, everything)
    whole = 0 if math.isnan(number) or abs(number) > everything else math.floor(number + (unit == "%") / 2)
    if whole < 1 or (not unit and number != whole):
        raise ConfigurationError(
            f"{option} {value}: give a whole number of experts, 1 to {everything}, or a share of them such as 25%, or "
            "memory such as 12GB that holds one"
        )
    return whole
