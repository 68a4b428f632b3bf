"""Layers one after the other, each read by a thread of its own while the caller works with the one before."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch

from groundwork.ahead import ReadAhead
from moe.streaming.layered import LayeredModel

_LAYERS = 2  # in memory: the one that computes, and the one being read
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own switch


class LayersAhead(Iterator[int]):
    """Yields the numbers of layers that have their weights; asking for the next one releases the last.

    At most two layers are in memory. `waited` counts the seconds in which the caller had nothing to compute. Use it in
    a `with` block, which leaves no layer loaded. An error of reading is raised where its layer would have come.
    """

    def __init__(self, layered: LayeredModel, indices: Iterable[int]) -> None:
        self.waited = 0.0
        self._layered, self._indices = layered, list(indices)
        self._room = threading.Semaphore(_LAYERS)
        self._left = False
        self._current: int | None = None
        self._ahead = ReadAhead(self._load(), _LAYERS)

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __next__(self) -> int:
        self._give_up()
        started = time.monotonic()
        self._current = next(self._ahead)
        self.waited += time.monotonic() - started
        return self._current

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        self._give_up()
        self._room.release()
        self._ahead.__exit__(kind, error, trace)
        for index in self._indices:
            self._layered.release(index)

    def _give_up(self) -> None:
        if self._current is not None:
            self._layered.release(self._current)
            self._current = None
            self._room.release()

    def _load(self) -> Iterator[int]:
        stream = torch.cuda.Stream(self._layered.device) if self._layered.device.type == "cuda" else None
        for index in self._indices:
            self._room.acquire()
            if self._left:
                return
            with _beside_computing(stream):
                self._layered.load(index)
            yield index


@contextmanager
def _beside_computing(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Have a GPU copy and convert in a stream of its own, and wait until that is done.

    transformers would copy in threads that know nothing of the stream, and so wait for what computes.
    """
    if stream is None:
        yield
        return
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()
    finally:
        if before is None:
            os.environ.pop(_NO_THREADS, None)
        else:
            os.environ[_NO_THREADS] = before
