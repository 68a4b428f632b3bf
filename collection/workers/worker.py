"""One worker: it holds or streams the model, takes passes, and hands their shards to the driver, which lists them."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from collection.executing import EXECUTIONS
from collection.output import Output
from collection.plan import Layout, make_spec, model_identity
from collection.settings import CollectSettings
from collection.tokens import TokenText
from collection.workers.events import Advanced, Done, Event, Facts, Failed, Finished, Said, Task
from groundwork.disk import saying_disk_full
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.hardware import describe_device
from traces.run_folder import FREE_AND_RESUME
from traces.writer import ShardWriter

Tell = Callable[[Event], None]


class PassWorker:
    """A context that holds the model of `settings`; raises as opening it does.

    `witness` is a file that the driver has just made in the run's folder: where it is missing, the folder is not shared
    with the driver, and ConfigurationError says so.
    """

    def __init__(self, settings: CollectSettings, layout: Layout, witness: Path) -> None:
        self._settings, self._layout, self._witness = settings, layout, witness
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if not self._witness.exists():
            raise ConfigurationError(
                f"{self._witness.parents[1]}: is not the same folder for the workers as for this process; name one on "
                "a file system that all of them share with --output_dir"
            )
        self._execution = self._stack.enter_context(EXECUTIONS[self._settings.execution](self._settings, self._layout))
        self._text = TokenText(self._execution.loaded.tokenizer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def facts(self) -> Facts:
        """Return what the model is."""
        loaded = self._execution.loaded
        spec = make_spec(loaded, self._execution.routers, self._settings)
        identity = model_identity(loaded, self._execution.weights, spec)
        device = describe_device(*loaded.devices)
        return Facts(spec, identity, self._execution.steps, device, socket.gethostname(), os.getpid())

    def run(self, task: Task, tell: Tell, is_stopped: Callable[[], bool]) -> None:
        """Write the shards of a pass, and tell what comes of it; Done or Failed comes last.

        `tell` is called from two threads. Once `is_stopped`, the pass is left after the batch under way.
        """

        def commit(writer: ShardWriter, notes: Sequence[str]) -> None:
            tell(Finished(writer.temporary, writer.finish(notes)))

        def bar(total: int, unit: str, done: int) -> _ToldProgress:
            return _ToldProgress(done, tell, is_stopped)

        others = {shard.index for shard in task.plan.shards} - set(task.shards)
        output = Output(commit=commit, bar=bar, attempt=task.attempt, working=task.working)
        try:
            with saying_disk_full(task.run_dir, FREE_AND_RESUME):
                self._execution.write_shards(task.run_dir, task.plan, self._layout, others, self._text, output)
        except KeyboardInterrupt:
            tell(Done(stopped=True))
        except Exception as error:
            tell_failure(error, tell)
        else:
            tell(Done())


def tell_failure(error: Exception, tell: Tell) -> None:
    """Tell of an error: one of ours by its sentence, any other with where it came from."""
    if not isinstance(error, ExpertSpeculationError):
        tell(Said("".join(traceback.format_exception(error)).rstrip()))
    message = str(error) if isinstance(error, ExpertSpeculationError) else f"{type(error).__name__}: {error}"
    tell(Failed(message, isinstance(error, ConfigurationError)))


class _ToldProgress:
    """Tells the driver of each step, and leaves the pass once the driver has said so."""

    def __init__(self, done: int, tell: Tell, is_stopped: Callable[[], bool]) -> None:
        self._done, self._tell, self._is_stopped = done, tell, is_stopped

    def __enter__(self) -> Self:
        if self._done:
            self._tell(Advanced(self._done))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self._tell(Advanced(n))
        if self._is_stopped():
            raise KeyboardInterrupt
