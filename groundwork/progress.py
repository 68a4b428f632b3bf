"""How far long work has come, on stderr: a tqdm bar on a terminal, one log line a minute elsewhere, never both."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Generic, Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60.0


class Progress(Generic[T]):
    """One running count; iterate over it, or call `update`, inside or outside a `with` block."""

    def __init__(self, iterable: Iterable[T] | None, total: int | None, description: str, unit: str, done: int) -> None:
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._iterable = iterable
        self._total, self._description, self._unit = total, description, unit
        self._count = self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._spoke = False
        self._postfix = ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=description or None, unit=unit, file=sys.stderr, dynamic_ncols=True
            )

    def update(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self._count += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def set_postfix(self, **values: object) -> None:
        """Show `name=value` pairs behind the count."""
        self._postfix = ", ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
        )
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix, refresh=False)

    def close(self) -> None:
        """Finish: closes the bar, or prints the last line if there were lines before."""
        if self._bar is not None:
            self._bar.close()
        elif self._spoke:
            self._print_line()
            self._spoke = False

    def __iter__(self) -> Iterator[T]:
        if self._iterable is None:
            raise ValueError("progress() was given no iterable to run through")
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _print_line(self) -> None:
        now = time.monotonic()
        self._last_line, self._spoke = now, True
        rate = (self._count - self._done_before) / max(now - self._started, 1e-9)
        parts = [f"{self._description}: {self._count}" if self._description else str(self._count)]
        parts[0] += f"/{self._total} {self._unit}" if self._total is not None else f" {self._unit}"
        parts.append(f"{rate:.3g} {self._unit}/s")
        if self._total is not None and rate > 0:
            parts.append(f"{_clock((self._total - self._count) / rate)} left")
        if self._postfix:
            parts.append(self._postfix)
        log(", ".join(parts))


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    description: str = "",
    unit: str = "it",
    done: int = 0,
) -> Progress[T]:
    """Return a progress display over `iterable`, or one to be advanced with `.update(n)`.

    `total` is counted in `unit`s and taken from `len(iterable)` where it has one; without it there is a rate but no
    ETA. `done` units were done before this process started, and do not count for the rate.
    """
    return Progress(iterable, total, description, unit, done)


def log(message: str) -> None:
    """Print one line to stderr, above an open bar where there is one."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def _clock(seconds: float) -> str:
    """Format seconds as [h:]mm:ss."""
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
