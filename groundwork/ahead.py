"""Items made ahead of their use in a thread of their own: a bounded queue between a producer and its caller."""

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

_SECONDS = 0.1  # between looks at whether the other side is still there


class ReadAhead(Iterator[T], Generic[T]):
    """Iterates over `items` while a thread makes up to `ahead` of the next ones; use it in a `with` block.

    An error of theirs is raised where the item would have come; leaving the block ends the thread.
    """

    def __init__(self, items: Iterable[T], ahead: int = 4) -> None:
        self._items = items
        self._queue: queue.Queue[T] = queue.Queue(ahead)
        self._ended, self._left = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read ahead")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __next__(self) -> T:
        while True:
            try:
                return self._queue.get(timeout=0 if self._ended.is_set() else _SECONDS)
            except queue.Empty:
                if self._ended.is_set() and self._queue.empty():
                    raise self._error or StopIteration from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _put(self, item: T) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put(item, timeout=_SECONDS)
                return True
            except queue.Full:
                continue
        return False
