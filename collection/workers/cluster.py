"""Workers that are actors of a Ray cluster, each with a GPU, or some processors, of its own.

Ray starts an actor again whose process or machine has died, as often as `MOST_RESTARTS`. The cluster is the one that
RAY_ADDRESS names; without it, Ray starts one of this machine alone, which ends with the run.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from collection.plan import Layout
from collection.settings import CollectSettings
from collection.workers.events import Done, Event, Lost, Ready, Task
from collection.workers.worker import PassWorker, tell_failure
from groundwork.errors import ConfigurationError
from groundwork.interrupt import SIGNALS

MOST_RESTARTS = 3  # of a worker; one that ends more often than that will go on doing so
_SECONDS_TO_REACH = 10.0  # the cluster's first machine
_SECONDS_FOR_EVENTS = 60.0  # until a worker that has ended its pass, and yet says nothing, is taken for lost


class RayWorkers:
    """A context with `settings.workers` actors, by default one for each GPU, or each machine where `device` is a CPU.

    Raises ConfigurationError where Ray is not installed, the cluster can not be reached, or has less to give.
    """

    def __init__(self, settings: CollectSettings, layout: Layout, witness: Path) -> None:
        self._settings, self._layout, self._witness = settings, layout, witness
        self.names: list[str] = []
        self._actors: list[Any] = []
        self._calls: dict[Any, int] = {}  # to open or run -> the worker
        self._asked: dict[int, Any] = {}  # by worker: a call for events that is not answered yet
        self._attempts: dict[int, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._ray = stack.enter_context(_connected())
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            for actor in self._actors:
                self._ray.kill(actor)
        finally:
            self._stack.close()

    def hand(self, worker: int, task: Task) -> None:
        """Give a worker its next pass; one that has ended is told of by `events`."""
        self._attempts[worker] = task.attempt
        self._calls[_once(self._actors[worker].run).remote(task)] = worker

    def stop(self) -> None:
        """Tell all workers to leave their passes after the batch under way."""
        for worker, attempt in self._attempts.items():
            _once(self._actors[worker].stop).remote(attempt)

    def events(self, seconds: float) -> Iterator[tuple[int, Event]]:
        """Yield what the workers tell, after waiting for at most so long."""
        if not self._calls:
            return
        ended, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        for call, worker in list(self._calls.items()):
            if worker in self._attempts and call not in ended:
                yield from ((worker, event) for event in self._told(worker, call, 0.0))
        for call in ended:
            worker = self._calls[call]
            if worker in self._asked:
                yield from ((worker, event) for event in self._told(worker, call, _SECONDS_FOR_EVENTS))
            if call in self._calls:
                yield from ((worker, event) for event in self._result(worker, call))

    def _start(self) -> None:
        """Make the actors and have them open the model."""
        settings, ray = self._settings, self._ray
        has = ray.cluster_resources()
        on_gpu = settings.device.startswith("cuda")
        there = int(has.get("GPU" if on_gpu else "CPU", 0))
        machines = sum(bool(node["Alive"]) for node in ray.nodes())
        count = settings.workers or (there if on_gpu else machines)
        if not 1 <= count <= there:
            raise ConfigurationError(
                f"--workers {count}: the Ray cluster has {there} {'GPUs' if on_gpu else 'processors'}, and each worker "
                "takes at least one; lower it, or add machines with 'ray start'"
            )
        if Path(settings.model).expanduser().is_dir():
            settings = replace(settings, model=str(Path(settings.model).expanduser().resolve()))
        actor = ray.remote(_Actor).options(
            num_cpus=1 if on_gpu else max(there // count, 1),
            num_gpus=1 if on_gpu else 0,
            max_restarts=MOST_RESTARTS,
            max_task_retries=-1,  # with 0, whatever a call's own options say, it fails while the actor starts again
            max_concurrency=4,  # run, and beside it events, stop and open
            scheduling_strategy="SPREAD",
        )
        settings = replace(settings, device="cuda:0" if on_gpu else settings.device)  # Ray shows an actor its own GPU
        self._shared = ray.put(self._layout)
        self.names = [f"worker {number}" for number in range(count)]
        self._actors = [actor.remote(settings, self._witness) for _ in range(count)]
        for worker in range(count):
            self._open(worker)

    def _open(self, worker: int) -> None:
        self._attempts.pop(worker, None)
        self._calls[self._actors[worker].open.remote(self._shared)] = worker

    def _told(self, worker: int, call: Any, seconds: float) -> list[Event]:
        """Return what a worker has to tell, where it answers in time."""
        asked = self._asked.pop(worker, None) or _once(self._actors[worker].events).remote()
        try:
            if self._ray.wait([asked], timeout=seconds)[0]:
                told: list[Event] = self._ray.get(asked)
                return told
        except self._ray.exceptions.RayActorError as error:
            return self._lost(worker, call, error)
        if seconds:
            return self._lost(worker, call, TimeoutError(f"no answer in {seconds:.0f} s"))
        self._asked[worker] = asked
        return []

    def _result(self, worker: int, call: Any) -> list[Event]:
        """Return what a worker told last before its call ended."""
        try:
            events: list[Event] = self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            return self._lost(worker, call, error)
        del self._calls[call]
        for event in events:
            if isinstance(event, Ready):
                self.names[worker] = f"worker {worker} on {event.facts.host}, process {event.facts.process}"
            if isinstance(event, Done):
                self._attempts.pop(worker, None)
        return events

    def _lost(self, worker: int, call: Any, error: Exception) -> list[Event]:
        """Have a worker open its model again that was lost during a pass; lost while opening, it is given up."""
        del self._calls[call]
        self._asked.pop(worker, None)
        was_running = worker in self._attempts
        if was_running:
            self._open(worker)
        return [Lost(_reason(error), was_running)]


def _once(method: Any) -> Any:
    """Return an actor's method as one that fails with its process, instead of being called again in the next one."""
    return method.options(max_task_retries=0)


def _reason(error: Exception) -> str:
    """Return the kind of an error of Ray and its first line, without what Ray says of every actor."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__} ({line.partition('. The task may')[0].rpartition('unavailable: ')[2].rstrip('.')})"


@contextmanager
def _connected() -> Iterator[Any]:
    """Yield the module `ray`, connected to its cluster; signals stay with the handlers that they had."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unless the user wants it
    named = os.environ.get("RAY_ADDRESS", "local") or "local"
    if named != "local":
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # tries, a second each, with a token that is refused
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            "--engine ray: Ray is not installed; install it with pip install 'expert-speculation[cluster]', or use "
            "--engine local"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    if named != "local":
        _check_reachable(named)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        # Without an address Ray joins whatever cluster this machine last had, and waits for one that has ended.
        # Of one of its own it warns that it has made a token for it, which is no news to the user.
        ray.init(address=named, logging_level=logging.ERROR if named == "local" else logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigurationError(
            f"--engine ray: the cluster at {named} can not be used ({reason}); start one with 'ray start', name it in "
            "RAY_ADDRESS, and where it asks for a token, which this machine needs too, set RAY_AUTH_MODE=token"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConfigurationError where no program listens: Ray would try for minutes, and heed no signal meanwhile."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ConfigurationError(
            f"RAY_ADDRESS={address}: is not HOST:PORT; give that of 'ray start --head', or unset it for a cluster of "
            "this machine alone"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_REACH).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"RAY_ADDRESS={address}: nothing answers there ({error}); start a cluster with 'ray start', and give the "
            "address of its first machine"
        ) from error


class _Actor:
    """What Ray runs: its methods are called from several threads."""

    def __init__(self, settings: CollectSettings, witness: Path) -> None:
        self._settings, self._witness = settings, witness
        self._worker: PassWorker | None = None
        self._busy, self._telling = threading.Lock(), threading.Lock()
        self._told: list[Event] = []
        self._running = self._stopped = ""

    def open(self, layout: Layout) -> list[Event]:
        """Open the model; where it is open already, the driver has lost touch, and what runs is left."""
        self._stopped = self._running
        with self._busy:
            self.events()
            try:
                if self._worker is None:
                    # Arrays that Ray shares between processes are read-only, which torch warns of.
                    own = [each._replace(token_ids_T=each.token_ids_T.copy()) for each in layout.sequences]
                    self._worker = PassWorker(self._settings, replace(layout, sequences=own), self._witness).__enter__()
                self._tell(Ready(self._worker.facts))
            except Exception as error:
                tell_failure(error, self._tell)
            return self.events()

    def run(self, task: Task) -> list[Event]:
        """Write a pass, and return the events that were not asked for before."""
        with self._busy:
            assert self._worker is not None
            self._running = task.attempt
            self._worker.run(task, self._tell, lambda: self._stopped == task.attempt)
            self._running = ""
            return self.events()

    def stop(self, attempt: str) -> None:
        self._stopped = attempt

    def events(self) -> list[Event]:
        """Return what there is to tell since the last time."""
        with self._telling:
            told, self._told = self._told, []
        return told

    def _tell(self, event: Event) -> None:
        with self._telling:
            self._told.append(event)
