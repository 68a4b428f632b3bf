"""Where finished shards go and progress shows: in the process that holds the run's folder, or with one that does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from collection.pass_state import WORKING_FOLDER
from groundwork.progress import Progress, progress
from traces.writer import ShardWriter


class Bar(Protocol):
    """What counts the work that is done; `update` may raise KeyboardInterrupt where the work is to stop."""

    def update(self, n: int = 1) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _local_bar(total: int, unit: str, done: int) -> Bar:
    shown: Progress[None] = progress(total=total, description="tracing", unit=unit, done=done)
    return shown


@dataclass(frozen=True)
class Output:
    """How a plan's work leaves the code that does it.

    `commit(writer, notes)` takes a shard that is written; `bar(total, unit, done)` makes the display; `attempt` is in
    the names of temporary files; `working` is the folder, in the run's, of a streamed pass's state.
    """

    commit: Callable[[ShardWriter, Sequence[str]], object] = ShardWriter.commit
    bar: Callable[[int, str, int], Bar] = _local_bar
    attempt: str = ""
    working: Path = WORKING_FOLDER


LOCAL = Output()
