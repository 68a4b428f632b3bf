"""The first signal waits for the end of a step, the second does not, and what was ignored stays ignored."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from groundwork.interrupt import SIGNALS, finishing_steps, raise_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put every handler back that a test has changed; a shell's background job begins with SIGINT ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    raise_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_at_once_outside_of_steps(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        send(number)


def done_until_interrupted(*steps: list[signal.Signals]) -> list[str]:
    """Send each step's signals, and return what was done when KeyboardInterrupt came."""
    done = []

    def work() -> None:
        with finishing_steps() as step_done:
            for number, signals in enumerate(steps):
                step_done()
                for each in signals:
                    send(each)
                done.append(f"step {number}")

    with pytest.raises(KeyboardInterrupt):
        work()
    return done


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_raised_when_the_step_is_done(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    assert done_until_interrupted([], [number], []) == ["step 0", "step 1"]
    assert "finishing this step first" in capfd.readouterr().err


def test_a_signal_in_the_last_step_is_raised_at_the_end() -> None:
    assert done_until_interrupted([], [signal.SIGINT]) == ["step 0", "step 1"]


def test_the_second_signal_interrupts_at_once() -> None:
    assert done_until_interrupted([], [signal.SIGTERM, signal.SIGINT]) == ["step 0"]


def test_an_error_is_not_hidden_by_a_signal_that_came_before_it() -> None:
    def work() -> None:
        with finishing_steps():
            send(signal.SIGINT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()


def test_handlers_are_restored_and_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    before = [signal.getsignal(number) for number in SIGNALS]
    raise_on_signals()
    with finishing_steps() as step_done:
        send(signal.SIGHUP)
        step_done()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_which_gets_no_signals_is_left_alone() -> None:
    steps = []

    def work() -> None:
        raise_on_signals()
        with finishing_steps() as step_done:
            step_done()
            steps.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert steps == ["done"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_pythons_exit_does_not_change_the_exit_code(number: signal.Signals) -> None:
    code = (
        "import os\n"
        "from groundwork.interrupt import raise_on_signals\n"
        "class Last:\n"
        f"    def __del__(self, kill=os.kill, own=os.getpid()): kill(own, {int(number)})\n"
        "last = Last()\n"
        "raise_on_signals()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
