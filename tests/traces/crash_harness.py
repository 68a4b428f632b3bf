"""Small runs that each meet their fate at another point: `crash_harness.py FOLDER FATE` makes them all below FOLDER.

Fates: `killed` dies of SIGKILL before its n-th file operation, for every n and after the last; `full` finds the disk
full from its n-th write on; `cut` is ended by the kernel in the middle of a write, once a file would grow beyond so
many bytes. Each run is a fork of this process, which imports no torch and watches its own calls. Prints a line for
each, separated by tabs: folder, point, the error's sentence where there was one, and how the process ended (-9:
SIGKILL).
"""

import io
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "traces")]

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from conftest import _make_plan, _make_sequences, _make_spec, _write_run  # noqa: E402

from groundwork.errors import ExpertSpeculationError  # noqa: E402

spec = _make_spec()
sequences = _make_sequences(spec, (5, 40, 3, 60, 7, 30, 20, 45))
OPERATIONS = {"open", "write", "flush", "truncate", "close", "__exit__", "mkdir", "fchmod", "fsync", "replace"}
OPERATIONS |= {"unlink", "flock"}
PARQUET = {pq.ParquetWriter.write_table.__code__, pq.ParquetWriter.close.__code__}  # Arrow itself writes unseen
CUTS = range(0, 12_000, 800)  # bytes; the last ones are beyond any file
FINISHED, BROKEN = 77, 70  # exit codes


def write_run(run_dir: Path) -> None:
    """Write two shards of several row groups each."""
    _write_run(run_dir, spec, sequences, shards=2, row_group_tokens=50)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk() -> None:
    """Let no file grow any more, which fails as a full disk does: in write, flush and close."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def strike_at(operations: set[str], strike: Callable[[], None], step: int, run_dir: Path) -> None:
    """Write the run, and strike before number `step` of these operations and Parquet's, or at the end.

    Ends the process where there are fewer.
    """
    number = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal number
        if event == "c_call" and function.__name__ in operations:
            owner = function.__self__  # a file, or a plain function's module
            importing = frame.f_code.co_filename.startswith("<frozen importlib")
            name = "" if importing or not isinstance(owner, io.IOBase | type(os)) else function.__name__
        else:
            name = frame.f_code.co_name if event == "call" and frame.f_code in PARQUET else ""
        if name:
            if number == step:
                report(run_dir.name, f"{name} in {frame.f_code.co_qualname}")
                strike()
            number += 1

    sys.setprofile(watch)
    write_run(run_dir)
    sys.setprofile(None)
    if number == step:
        report(run_dir.name, "the end")
        strike()
    if number < step:
        os._exit(FINISHED)


def cut_at(step: int, run_dir: Path) -> None:
    """Write the run under a limit of file sizes, with the signal that Python ignores left to end the process."""
    if step == len(CUTS):
        os._exit(FINISHED)
    report(run_dir.name, f"beyond {CUTS[step]} bytes")
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUTS[step], resource.RLIM_INFINITY))
    write_run(run_dir)


def report(*values: object, end: str = "\t") -> None:
    print(*values, sep="\t", end=end, flush=True)


def fork(work: Callable[[], None]) -> int:
    """Do the work in a child; returns its exit code, or -n where signal n ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except ExpertSpeculationError as error:
        report(error)
        os._exit(error.exit_code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(BROKEN)


def main(folder: Path, fate: str) -> None:
    pa.set_cpu_count(1)
    _make_plan(spec, sequences)  # Arrow imports pandas for its first table: once, and not in each child
    meet = {
        "killed": partial(strike_at, OPERATIONS, kill),
        "full": partial(strike_at, {"write"}, fill_the_disk),
        "cut": cut_at,
    }[fate]
    for number in count():
        code = fork(partial(meet, number, folder / f"run{number:03d}"))
        if code == FINISHED:
            break
        report(code, end="\n")
        assert code != BROKEN
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
