"""What an import is told: where to write, what model it was, and what the source leaves out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from groundwork.errors import ConfigurationError
from traces.schema import PHASES

UNKNOWN = "unknown"
FIELDS = {  # of `records`: what --field can name -> the key it is read from when not told otherwise
    "sequence": "problem_id",
    "key": "sequence_key",
    "layer": "layer",
    "token": "token_idx",
    "experts": "experts",
    "weights": "gating_probs",
    "token_id": "token_id",
    "text": "token",
    "dataset": "dataset",
    "phase": "phase",
}


@dataclass(frozen=True)
class ImportSettings:
    """The settings of one import; raises ConfigurationError where they contradict each other.

    `num_layers` counts the layers that the source records for a token, dense ones included; `moe_layers` are the
    model's own numbers of the MoE layers among them. `phase` and `dataset` are used where the source does not say.
    """

    format: str
    output_dir: Path
    num_experts: int
    model_name: str
    num_layers: int | None = None
    top_k: int | None = None
    moe_layers: tuple[int, ...] | None = None
    phase: str = "prefill"
    dataset: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)  # records only: name in FIELDS -> key in the source
    sequence_length: int | None = None  # flame only: tokens per sequence
    model_revision: str | None = None
    quantization: str = UNKNOWN
    model_dtype: str = UNKNOWN
    router_dtype: str = UNKNOWN
    shard_size_mb: float = 256.0
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_layers", "top_k", "sequence_length"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 65535:
                raise ConfigurationError(f"--{name} {value}: must be in 1..65535")
        if self.phase not in PHASES:
            raise ConfigurationError(f"--phase {self.phase}: must be one of {', '.join(PHASES)}")
        if not self.shard_size_mb > 0:
            raise ConfigurationError(f"--shard_size_mb {self.shard_size_mb:g}: must be above 0")
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ConfigurationError(f"--top_k {self.top_k}: exceeds --num_experts {self.num_experts}; correct one")
        unknown = self.fields.keys() - FIELDS.keys()
        if unknown:
            raise ConfigurationError(f"--field {sorted(unknown)[0]}: unknown; choose one of {', '.join(FIELDS)}")
        if self.fields and self.format != "records":
            raise ConfigurationError(f"--field is for the format records, not for {self.format}; leave it out")
        if self.sequence_length is not None and self.format != "flame":
            raise ConfigurationError(f"--sequence_length is for the format flame, not for {self.format}; leave it out")
        self._check_layers()

    def _check_layers(self) -> None:
        layers, count = self.moe_layers, self.num_layers
        if layers is None:
            return
        if not layers or layers[0] < 0 or any(b <= a for a, b in pairwise(layers)):
            raise ConfigurationError(
                f"--moe_layers {layers_text(layers)}: must rise from 0 or more, e.g. 1-26 or 1,3,5"
            )
        if count is not None and count != len(layers) and count <= layers[-1]:
            raise ConfigurationError(
                f"--moe_layers {layers_text(layers)}: names {len(layers)} layers up to {layers[-1]}, but --num_layers "
                f"is {count}; --num_layers counts all layers that the source records, dense ones included"
            )

    @property
    def recorded_layers(self) -> int | None:
        """Return how many layers a token has in the source, for arrays that come without a shape; None if unknown."""
        if self.num_layers is not None:
            return self.num_layers
        return None if self.moe_layers is None else self.moe_layers[-1] + 1


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers that `--moe_layers` names: numbers and ranges, e.g. `1-26` or `1,3,5-7`."""
    layers: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if not match:
            raise ConfigurationError(f"--moe_layers {text}: {part!r} is no layer; give numbers and ranges, e.g. 1-26")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(layers)


def layers_text(layers: tuple[int, ...]) -> str:
    """Return layers as `parse_layers` reads them: runs as ranges."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)
