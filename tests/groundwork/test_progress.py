"""Off a terminal progress is one line a minute on stderr; on one it is a bar; never both."""

import io
import sys

import pytest

from groundwork import progress as module
from groundwork.progress import log, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_short_work_off_a_terminal_is_silent(capsys):
    assert list(progress(range(5), description="counting")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_long_work_off_a_terminal_prints_lines_with_rate_and_time_left(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with progress(total=10, description="tracing", unit="seq") as bar:
        bar.set_postfix(loss=1.23456, shard=2)
        for _ in range(10):
            bar.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert 2 < len(lines) < 10
    assert lines[0].startswith("tracing: 3/10 seq, ")
    assert lines[0].endswith("left, loss=1.235, shard=2")
    assert lines[-1].startswith("tracing: 10/10 seq, ")


def test_what_was_done_before_counts_for_the_total_but_not_for_the_rate(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with progress(total=100, description="tracing", unit="seq", done=90) as bar:
        for _ in range(2):
            bar.update()
    assert capsys.readouterr().err.splitlines()[0] == "tracing: 92/100 seq, 0.0167 seq/s, 08:00 left"


def test_terminal_gets_a_bar_and_logs_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for n in progress(range(3), description="tracing", unit="seq"):
        log(f"note {n}")
    assert "tracing: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "note 1\n" in terminal.getvalue()


def test_iterating_without_an_iterable_is_refused():
    with pytest.raises(ValueError, match="no iterable"):
        list(progress(total=3))
