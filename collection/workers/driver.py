"""Works a plan off with several workers: hands out passes, and alone puts finished shards in place and lists them.

A worker that ends in the middle of a pass costs what of the pass is not listed yet: that is handed out again, and its
streamed state, a folder that is renamed first so that no other writer can reach it, taken up at the layer under way.
Rows are those of a run in one process, because batches never cross shards.
"""

import os
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from collection.pass_state import PassState, state_folders
from collection.passes import cut_passes
from collection.workers.events import Advanced, Done, Event, Facts, Failed, Finished, Lost, Ready, Said, Task
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.interrupt import finishing_steps
from groundwork.progress import Progress, log, progress
from groundwork.provenance import library_versions
from traces.plan import Plan, PlannedShard
from traces.run_folder import witness_path
from traces.writer import list_shard

MOST_ATTEMPTS = 3  # at a pass; one that ended its worker so often will go on doing so
_SECONDS = 0.5  # between looks at whether a signal has come


class Workers(Protocol):
    """Processes somewhere, known by numbers from 0 that are the places of their `names`."""

    names: list[str]

    def hand(self, worker: int, task: Task) -> None: ...

    def stop(self) -> None: ...

    def events(self, seconds: float) -> Iterator[tuple[int, Event]]: ...


@dataclass
class _Pass:
    """Shards that go to one worker; `state` is the folder of what a streamed attempt has left."""

    shards: dict[int, PlannedShard]
    state: Path | None = None
    attempts: int = 0
    attempt: str = ""
    counted: int = 0  # what the bar shows of the attempt under way, but for shards that are listed


@contextmanager
def witness(run_dir: Path) -> Iterator[Path]:
    """Yield a file in the run's folder by which workers see that it is the same folder; the caller holds it."""
    path = witness_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


class Driver:
    """Drives `workers`, which are in their own context; the caller holds the run's folder."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._idle: set[int] = set()
        self._ended: dict[int, str] = {}
        self._running: dict[int, _Pass] = {}
        self._facts: dict[int, Facts] = {}
        self._bar: Progress[None] | None = None

    def facts(self) -> Facts:
        """Wait for the first worker to have its model, and return what that is."""
        while not self._facts:
            self._look()
        return next(iter(self._facts.values()))

    def write_shards(self, run_dir: Path, plan: Plan, finished: set[int], pass_tokens: int | None) -> None:
        """Write every shard that is not `finished`, in passes of about `pass_tokens`, or of a shard each.

        Raises KeyboardInterrupt once a signal has come and the workers have finished their batches,
        ExpertSpeculationError for a pass that keeps ending its workers, and whatever ended a worker for good.
        """
        self._run_dir, self._plan = run_dir, plan
        left = {shard.index: shard for shard in plan.shards if shard.index not in finished}
        total = sum(shard.num_tokens for shard in left.values())
        self._waiting = self._begun(left) if pass_tokens else deque()
        share = min(pass_tokens, -(-total // len(self._workers.names))) if pass_tokens else 1
        others = left.keys() - {index for each in self._waiting for index in each.shards}
        cut = cut_passes([left[index] for index in sorted(others)], share)
        self._waiting += [_Pass({shard.index: shard for shard in shards}) for shards in cut]
        self._drop_states({each.state for each in self._waiting})
        steps = self.facts().steps
        unit = "token" if steps == 1 else "token-layer"
        self._bar = progress(total=total * steps, description="tracing", unit=unit)
        with self._bar, finishing_steps() as step_done:
            try:
                while self._waiting or self._running:
                    step_done()
                    for worker in sorted(self._idle) if self._waiting else ():
                        if self._waiting:
                            self._hand(worker, self._waiting.popleft())
                    self._look()
            except KeyboardInterrupt:
                self._leave()
                raise
        self._drop_states(set())

    def _hand(self, worker: int, own: _Pass) -> None:
        attempt = uuid.uuid4().hex
        working = Path(".tmp") / f"pass-{attempt}"
        if own.state is not None:
            os.rename(own.state, self._run_dir / working)  # noqa: PTH104 - beside os.replace: never onto another
        own.state, own.counted = self._run_dir / working, 0
        own.attempts, own.attempt = own.attempts + 1, attempt
        self._idle.discard(worker)
        self._running[worker] = own
        self._workers.hand(worker, Task(self._run_dir, self._plan, tuple(own.shards), attempt, working))

    def _look(self) -> None:
        """Wait a moment for what workers tell, and do what it asks for."""
        for worker, event in self._workers.events(_SECONDS):
            self._heed(worker, event)

    def _heed(self, worker: int, event: Event) -> None:
        name = self._workers.names[worker]
        match event:
            case Said(line):
                log(f"{name}: {line}")
            case Ready(facts):
                self._check(name, facts)
                self._facts[worker] = facts
                self._idle.add(worker)
            case Advanced(tokens):
                self._count(self._running[worker], tokens)
            case Finished(temporary, line):
                own = self._running[worker]
                list_shard(self._run_dir, temporary, line)
                del own.shards[line.index]
                own.counted -= line.tokens * self._facts[worker].steps  # done for good, whatever comes of the others
            case Done():
                own = self._running.pop(worker)
                self._idle.add(worker)
                if own.shards and not event.stopped:
                    raise AssertionError(f"{name} left out shards {sorted(own.shards)}")
            case Failed(message, is_configuration):
                raise (ConfigurationError if is_configuration else ExpertSpeculationError)(message)
            case Lost(reason, restarting):
                self._lose(worker, reason, restarting)

    def _lose(self, worker: int, reason: str, restarting: bool) -> None:
        name = self._workers.names[worker]
        own = self._running.pop(worker, None)
        self._idle.discard(worker)
        if not restarting:
            self._ended[worker] = reason
        log(f"{name}: ended with {reason}" + (", and is started again" if restarting else ""))
        if own is not None and own.shards:
            self._count(own, -own.counted)
            for torn in self._run_dir.glob(f".tmp/{own.attempt}.*"):
                torn.unlink()
            numbers = ", ".join(str(index) for index in sorted(own.shards))
            if own.attempts >= MOST_ATTEMPTS:
                raise ExpertSpeculationError(
                    f"{self._run_dir}: shards {numbers} ended their worker {own.attempts} times, the last with "
                    f"{reason}; see what ended it (memory, for instance), and run again with --resume"
                )
            if own.state is not None and PassState.found(own.state, self._plan.fingerprint) is None:
                own.state = self._dropped(own.state)
            self._waiting.appendleft(own)
        if len(self._ended) == len(self._workers.names):
            raise ExpertSpeculationError(
                f"all workers have ended, the last with {reason}; see what ended them (memory, for instance), and run "
                "again with --resume"
            )

    def _leave(self) -> None:
        """Have the workers finish their batches, and list what shards they still finish."""
        self._workers.stop()
        while self._running:
            self._look()

    def _count(self, own: _Pass, tokens: int) -> None:
        own.counted += tokens
        if self._bar is not None:
            self._bar.update(tokens)

    def _check(self, name: str, facts: Facts) -> None:
        """Raise ConfigurationError where a worker has another model, or other libraries, than the others."""
        mine = library_versions()
        for library, version in facts.spec.library_versions.items():
            if mine.get(library) != version:
                raise ConfigurationError(
                    f"{name}: has {library} {version}, and this process {mine.get(library)}; install the same versions "
                    "on all machines"
                )
        first = next(iter(self._facts.values()), facts)
        differing = [each for each in facts.identity if facts.identity[each] != first.identity.get(each)]
        if differing or facts.spec != first.spec:
            raise ConfigurationError(
                f"{name}: differs from the first worker in {', '.join(differing) or 'what its traces would say'}; give "
                "all machines the same model files and the same kind of device"
            )

    def _begun(self, left: dict[int, PlannedShard]) -> deque[_Pass]:
        """Return the passes whose state an earlier run has left, as far as they are still to be done."""
        begun: deque[_Pass] = deque()
        seen: set[int] = set()
        for folder in state_folders(self._run_dir):
            state = PassState.found(folder, self._plan.fingerprint)
            own = [index for index in state.shards if index in left and index not in seen] if state else []
            if own:
                seen.update(own)
                begun.append(_Pass({index: left[index] for index in own}, folder))
        return begun

    def _drop_states(self, kept: set[Path | None]) -> None:
        for folder in state_folders(self._run_dir):
            if folder not in kept:
                PassState.clear(folder)

    @staticmethod
    def _dropped(folder: Path) -> None:
        PassState.clear(folder)
