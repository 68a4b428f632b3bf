"""What a collection run is told: every option of `collect`, checked when the settings are made."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from collection.passes import PASS_TOKENS
from groundwork.errors import ConfigurationError
from traces.schema import HIDDEN, LOOKAHEAD_NORMS, OPTIONAL_COLUMNS

EXECUTIONS = ("auto", "resident", "streamed")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class CollectSettings:
    """Options of one run; raises ConfigurationError for values that can not be meant.

    Without `quantization` weights stay as they are stored. `batch_size` counts sequences and, where given, replaces
    `batch_tokens`, which counts tokens with padding; "auto" finds the latter by probing, and without either it is the
    preset for the device's memory. `generate` tokens are decoded after each text, sampled at `temperature`, or the
    likeliest where that is 0. `shard_size_mb` is in 10**6 bytes. `store` names the columns beside the expert ids; a
    `lookahead` of H layers stores the lookahead column, and that column alone stands for H = 1; `lookahead_norm` is
    what ResidentTracer says of it. `sample_hidden` is the share of tokens that carry what the routers read. A streamed
    `execution` takes whole shards of about `pass_tokens` through the layers together, and keeps hidden states of
    `memory_budget_gb` (10**9 bytes) in host memory, or of half of what is free there, and the others on disk; `auto` is
    resident where the model fits, else streamed. To `measure` is to read and run a few layers of the model first, and
    so tell how long the run will take. Devices joined by commas get a process each; those joined by plus signs hold the
    model of one process together.
    """

    model: str = "models/mini-mixtral"
    quantization: str | None = None
    execution: str = "resident"
    measure: bool = False
    pass_tokens: int = PASS_TOKENS
    memory_budget_gb: float | None = None
    datasets: str = "installed"
    dataset_root: Path | None = None
    target_traces: int = 1500
    max_length: int = 512
    min_tokens: int = 8
    batch_size: int | Literal["auto"] | None = None
    batch_tokens: int | None = None
    generate: int = 0
    temperature: float = 0.8
    device: str = "auto"
    dtype: str = "auto"
    shard_size_mb: float = 256.0
    output_dir: Path | None = None
    output_suffix: str | None = None
    store: tuple[str, ...] = ("weights",)
    lookahead: int = 0
    lookahead_norm: str = "next"
    sample_hidden: float = 0.0
    seed: int = 0
    resume: bool = False
    engine: str = "local"
    workers: int | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None

    def __post_init__(self) -> None:
        counts = ("target_traces", "max_length", "min_tokens", "batch_size", "batch_tokens", "pass_tokens", "workers")
        for name in counts:
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise ConfigurationError(f"--{name} {value}: must be at least 1; give a larger number")
        if self.batch_size == "auto" and self.batch_tokens is not None:
            raise ConfigurationError(
                f"--batch_tokens {self.batch_tokens}: --batch_size auto finds the number of tokens itself; give one of "
                "the two"
            )
        self._check_finite()
        if self.shard_size_mb <= 0:
            raise ConfigurationError(
                f"--shard_size_mb {self.shard_size_mb:g}: must be above 0; give the megabytes of a shard, such as 256"
            )
        if self.temperature < 0:
            raise ConfigurationError(
                f"--temperature {self.temperature:g}: must not be negative; 0 takes the likeliest token"
            )
        for name in ("lookahead", "generate", "seed"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"--{name} {getattr(self, name)}: must not be negative; give 0 or more")
        if self.min_tokens > self.max_length:
            raise ConfigurationError(
                f"--min_tokens {self.min_tokens}: exceeds --max_length {self.max_length}, so no text would be kept; "
                "lower it"
            )
        unknown = [name for name in self.store if name not in OPTIONAL_COLUMNS]
        if unknown:
            raise ConfigurationError(
                f"--store {unknown[0]}: unknown column; choose among {', '.join(OPTIONAL_COLUMNS)}"
            )
        if not 0 <= self.sample_hidden <= 1:
            raise ConfigurationError(
                f"--sample_hidden {self.sample_hidden:g}: must be a share of the tokens, 0 to 1; give such as 0.01"
            )
        if self.lookahead_norm not in LOOKAHEAD_NORMS:
            raise ConfigurationError(
                f"--lookahead_norm {self.lookahead_norm}: unknown; use {', '.join(LOOKAHEAD_NORMS)}"
            )
        if self.execution not in EXECUTIONS:
            raise ConfigurationError(f"--execution {self.execution}: unknown; use {', '.join(EXECUTIONS)}")
        if self.engine not in ENGINES:
            raise ConfigurationError(f"--engine {self.engine}: unknown; use {', '.join(ENGINES)}")
        if self.workers is not None and self.engine != "ray":
            raise ConfigurationError(
                f"--workers {self.workers}: counts those of --engine ray; give that too, or name a device for each "
                "process of this machine, as --device cuda:0,cuda:1"
            )
        self._check_streamed()
        self._check_output()

    def _check_finite(self) -> None:
        wanted = {
            "shard_size_mb": "the megabytes of a shard, such as 256",
            "temperature": "0, which takes the likeliest token, or more, such as 0.8",
            "memory_budget_gb": "the gigabytes of host memory for hidden states, such as 16, or leave it out",
        }
        for name, remedy in wanted.items():
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigurationError(f"--{name} {value:g}: must be a finite number; give {remedy}")

    def _check_output(self) -> None:
        url = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.*)", str(self.output_dir or ""))  # Path makes one slash of two
        if url:
            raise ConfigurationError(
                f"--output_dir {url[1]}://{url[2]}: is an address, and shards are put in place by renaming, which "
                "object stores can not do; give a folder of a file system, shared by all machines, and copy the run "
                "there when it is done"
            )
        if self.output_suffix is not None:
            if self.output_dir is not None:
                raise ConfigurationError(
                    f"--output_suffix {self.output_suffix}: only lengthens the default folder's name; "
                    "give the whole name in --output_dir, or leave that out"
                )
            if "/" in self.output_suffix:
                raise ConfigurationError(
                    f"--output_suffix {self.output_suffix}: must not hold '/'; name another folder with --output_dir"
                )

    def _check_streamed(self) -> None:
        budget = self.memory_budget_gb
        if budget is not None and budget < 0:
            raise ConfigurationError(
                f"--memory_budget_gb {budget:g}: must not be negative; give the gigabytes of host memory for hidden "
                "states, or 0 to keep them all on disk"
            )
        if self.execution == "streamed":
            refusal = self.refusal_of("streamed")
            if refusal is not None:
                raise refusal

        if self.measure and self.generate:
            raise ConfigurationError(
                f"--measure: times whole texts, not tokens one by one as --generate {self.generate} decodes them; "
                "leave one of the two out"
            )

    @property
    def first_device(self) -> str:
        """Return the first of the devices that hold the model."""
        return self.device.split("+")[0]

    @property
    def unstreamable(self) -> str | None:
        """Return the option, with its value, that a streamed execution can not have; None where there is none."""
        if "+" in self.device:
            return f"--device {self.device}"
        if self.generate:
            return f"--generate {self.generate}"
        return "--batch_size auto" if self.batch_size == "auto" else None

    def refusal_of(self, execution: str) -> ConfigurationError | None:
        """Return why these options can not be had in an execution; None where they can."""
        option = self.unstreamable
        if execution != "streamed" or option is None:
            return None
        reasons = {
            "--device": "--execution streamed holds a layer or two of the model, for which one device will do; join "
            "devices by commas instead, for a process on each",
            "--generate": "decodes token by token, which would read the whole model for each; use --execution resident",
            "--batch_size": "runs batches through the whole model, which --execution streamed never holds; give "
            "--batch_tokens, or leave both out",
        }
        return ConfigurationError(f"{option}: {reasons[option.partition(' ')[0]]}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the optional columns to store, in the format's order."""
        wanted = {*self.store, *(["lookahead"] if self.lookahead else [])}
        return tuple(name for name in OPTIONAL_COLUMNS if name in wanted) + ((HIDDEN,) if self.sample_hidden else ())

    @property
    def horizons(self) -> int:
        """Return H, how many layers ahead the lookahead column reaches; 0 where it is not stored."""
        return max(self.lookahead, 1) if "lookahead" in self.columns else 0

    def run_dir(self, model_name: str) -> Path:
        """Return the run's folder; without `output_dir` it is called after the model."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        suffix = f"_{self.output_suffix}" if self.output_suffix else ""
        return Path("routing_data") / (model_name.rsplit("/", 1)[-1] + suffix)
