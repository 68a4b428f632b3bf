"""Work that goes on in a thread of its own while the caller makes the next item: a bounded queue between the two.

Nothing gets lost or out of order, and an error on either side ends both.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

_SECONDS = 0.1  # between looks at whether the other side is still there


class Abandoned(Exception):
    """Raised by the items' iterator where the caller gave up before its last item, so that `consume` undoes its own."""


class Background(Generic[T]):
    """Runs `consume(items)` in a thread; `put` gives it an item, and waits where `ahead` items wait already.

    Leaving the `with` block waits until all is consumed, or, after an error in the block, until `consume` has ended
    with Abandoned. `put` and leaving raise what `consume` raised.
    """

    def __init__(self, consume: Callable[[Iterator[T]], None], ahead: int = 2) -> None:
        self._consume = consume
        self._queue: queue.Queue[T] = queue.Queue(ahead)
        self._complete, self._abandoned = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Give the thread its next item."""
        while self._thread.is_alive():
            try:
                return self._queue.put(item, timeout=_SECONDS)
            except queue.Full:
                continue
        raise self._error or ValueError("an item was put after consume() had returned")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self._complete if error is None else self._abandoned).set()
        try:
            self._thread.join()
        except BaseException:  # a second signal, which does not wait for what is queued, but does for the thread
            self._abandoned.set()
            self._thread.join()
            raise
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._consume(self._items())
        except BaseException as error:
            self._error = error

    def _items(self) -> Iterator[T]:
        while True:
            if self._abandoned.is_set():
                raise Abandoned
            try:
                yield self._queue.get(timeout=_SECONDS)
            except queue.Empty:
                if self._complete.is_set() and self._queue.empty():
                    return
