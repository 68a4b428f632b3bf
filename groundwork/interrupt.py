"""Signals that end a program early (Ctrl-C, a scheduler's SIGTERM, a closed terminal), without tearing its work.

Outside of `finishing_steps` each raises KeyboardInterrupt wherever the program is. Inside, the first one is only noted,
and raised when the program next says that a step is done; a second one is raised at once.
"""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = b"\nInterrupted: finishing this step first; once more interrupts at once.\n"


def raise_on_signals() -> None:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does; what is ignored (under nohup) stays ignored.

    Once Python exits they are ignored: the work is done, and its exit code shall say so.
    """
    for number in _heeded():
        signal.signal(number, _raise)
    atexit.register(_ignore)


@contextlib.contextmanager
def finishing_steps() -> Iterator[Callable[[], None]]:
    """Yield the function to call between steps: it raises KeyboardInterrupt once a signal has come.

    So does leaving the block. Outside of the main thread, which gets no signals, nothing is changed.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, NOTICE)

    def step_done() -> None:
        if noted:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in _heeded()}
    try:
        yield step_done
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    step_done()


def _heeded() -> list[signal.Signals]:
    """Return the signals that are not ignored, where this thread may handle them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _ignore() -> None:
    for number in _heeded():
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
