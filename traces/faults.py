"""What is wrong with a file of a run and what to do about it: a `Fault`, as a value or raised as a `FaultError`.

File names and contents may come from anyone, so whatever is shown of them is kept to one printable line.
"""

from dataclasses import dataclass
from pathlib import Path

from groundwork.errors import ConfigurationError

REPAIR = "run 'expert-speculation verify --repair' on the run folder"
COLLECT_AGAIN = (
    "restore it from a copy, or move it away with 'expert-speculation verify --repair' and make it anew by running the "
    "command that wrote the folder again with --resume"
)
RESUME = "run the command that wrote the folder again with --resume"
MOVE_AWAY = "move it away"

_SHOWN = 400  # characters of a foreign message


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, where, and what to do about it.

    `proven` is False where a file could not be read at all just now, which says nothing about its content.
    """

    path: Path
    problem: str
    remedy: str
    proven: bool = True

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.problem}; {self.remedy}")


def unread(path: Path, error: OSError) -> Fault:
    """Return the fault of a file that the system does not let us read."""
    return Fault(path, f"can not be read ({error.strerror})", "check its permissions and the disk", proven=False)


class FaultError(ConfigurationError):
    """A fault that keeps a file from being used."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def printable(text: str) -> str:
    """Return text as one line without control characters, which could rewrite what a terminal shows."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened: Arrow appends its own source lines."""
    line = printable((str(error).splitlines() or [type(error).__name__])[0])
    return line if len(line) <= _SHOWN else line[:_SHOWN] + " ..."
