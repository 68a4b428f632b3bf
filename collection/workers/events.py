"""What a worker tells its driver, and the passes that the driver hands out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.manifest import ManifestLine
from traces.plan import Plan
from traces.schema import TraceSpec


@dataclass(frozen=True, eq=False)
class Task:
    """Some shards of `plan`, by number, to be written below `run_dir`.

    `attempt` is unique, and in the names of all temporary files; a streamed pass keeps its state in `working`.
    """

    run_dir: Path
    plan: Plan
    shards: tuple[int, ...]
    attempt: str
    working: Path


@dataclass(frozen=True)
class Facts:
    """What a worker's model is: the spec of its traces, the plan's settings that it decides, and where it runs.

    `steps` is how often each token is counted as done: once, or once a layer. `host` and `process` tell the
    user which it is.
    """

    spec: TraceSpec
    identity: dict[str, Any]
    steps: int
    device: str
    host: str
    process: int


@dataclass(frozen=True)
class Ready:
    """The worker has its model and waits for a pass."""

    facts: Facts


@dataclass(frozen=True)
class Advanced:
    """So many tokens, counted `Facts.steps` times, are done."""

    tokens: int


@dataclass(frozen=True)
class Finished:
    """A shard is written, read back and fsync'ed at `temporary`; the driver moves it into place and lists it."""

    temporary: Path
    line: ManifestLine


@dataclass(frozen=True)
class Done:
    """The pass is done, or, where `stopped`, was left because the driver said so."""

    stopped: bool = False


@dataclass(frozen=True)
class Said:
    """A line for the user."""

    line: str


@dataclass(frozen=True)
class Failed:
    """The pass, or the loading of the model, can not succeed anywhere; `is_configuration`: by what it was told."""

    message: str
    is_configuration: bool


@dataclass(frozen=True)
class Lost:
    """The worker's process ended; where `restarting`, another one takes its place and will be Ready."""

    reason: str
    restarting: bool


Event = Ready | Advanced | Finished | Done | Said | Failed | Lost
