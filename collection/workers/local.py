"""Workers that are processes of this machine, one for each device, with a pipe to each."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import TextIOBase
from multiprocessing import connection, get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from collection.plan import Layout
from collection.settings import CollectSettings
from collection.workers.events import Event, Lost, Ready, Said, Task
from collection.workers.worker import PassWorker, tell_failure
from groundwork.interrupt import SIGNALS

MOST_RESTARTS = 3  # of a worker; one that ends more often than that will go on doing so


class LocalWorkers:
    """A context with a process for each of `devices`, which may repeat; workers are known by their number from 0."""

    def __init__(self, settings: CollectSettings, layout: Layout, devices: Sequence[str], witness: Path) -> None:
        self.names = [f"worker {number} on {device}" for number, device in enumerate(devices)]
        self._arguments = [(replace(settings, device=device), layout, witness) for device in devices]
        shared = sum(device == "cpu" for device in devices)
        self._threads = max(torch.get_num_threads() // shared, 1) if shared else 0
        self._context = get_context("spawn")  # a fork would inherit torch's threads and CUDA, which do not survive it
        self._processes: dict[int, _Process] = {}
        self._starts = [0] * len(devices)

    def __enter__(self) -> Self:
        for number in range(len(self.names)):
            self._start(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each in self._processes.values():
            each.end()

    def hand(self, worker: int, task: Task) -> None:
        """Give a worker its next pass; one that has ended is told of by `events`."""
        with contextlib.suppress(OSError):
            self._processes[worker].pipe.send(task)

    def stop(self) -> None:
        """Tell all workers to leave their passes after the batch under way."""
        for each in self._processes.values():
            with contextlib.suppress(OSError):
                each.pipe.send(None)

    def events(self, seconds: float) -> Iterator[tuple[int, Event]]:
        """Yield what the workers tell, after waiting for at most so long."""
        pipes = {each.pipe: number for number, each in self._processes.items()}
        for ready in connection.wait(list(pipes), seconds):
            assert isinstance(ready, connection.Connection)
            number = pipes[ready]
            try:
                yield number, ready.recv()
            except (EOFError, ConnectionError):
                reason = self._processes.pop(number).end()
                again = self._starts[number] <= MOST_RESTARTS
                if again:
                    self._start(number)
                yield number, Lost(reason, again)

    def _start(self, number: int) -> None:
        self._starts[number] += 1
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._threads, *self._arguments[number]), daemon=True
        )
        process.start()
        theirs.close()  # so that reading ends when the process does
        self._processes[number] = _Process(process, ours)


class _Process:
    def __init__(self, process: Any, pipe: connection.Connection) -> None:
        self.process, self.pipe = process, pipe

    def end(self) -> str:
        """End the process, if it has not by itself, and say how it ended."""
        self.pipe.close()
        self.process.join(0.2)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(pipe: connection.Connection, threads: int, settings: CollectSettings, layout: Layout, witness: Path) -> None:
    """Be a worker until the driver hangs up; signals that a terminal sends to all are the driver's to heed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if settings.device == "cpu" and threads:
        torch.set_num_threads(threads)
    one_at_a_time = threading.Lock()

    def tell(event: Event) -> None:
        with one_at_a_time:
            pipe.send(event)

    def is_stopped() -> bool:
        return pipe.poll()  # the driver sends nothing during a pass but the word to stop, or it hangs up

    sys.stderr = _Lines(tell)
    with contextlib.suppress(ConnectionError, EOFError):  # the driver is gone, and so is what this one was for
        try:
            with PassWorker(settings, layout, witness) as worker:
                tell(Ready(worker.facts))
                while True:
                    task = pipe.recv()
                    if task is not None:
                        worker.run(task, tell, is_stopped)
        except (ConnectionError, EOFError):
            raise
        except Exception as error:
            tell_failure(error, tell)
    os._exit(0)  # a library's threads must not keep a process whose driver has gone


class _Lines(TextIOBase):
    """Takes text, and tells its lines."""

    def __init__(self, tell: Any) -> None:
        self._tell, self._rest = tell, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(None, lines):
            self._tell(Said(line))
        return len(text)
