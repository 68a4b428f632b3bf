"""Opens and verifies folders in a process of its own, with little memory: `hostile_harness.py FOLDER...`.

Prints one JSON line for each folder: what `verify` and `TraceDataset` said of it, and by how much the peak memory of the
process has grown by then. A line without them means that something else was raised than our own errors.
"""

import json
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402

from groundwork.errors import ExpertSpeculationError  # noqa: E402
from traces.reader import COLUMNS, TraceDataset  # noqa: E402
from traces.verify import verify  # noqa: E402


def read_all(folder: Path) -> str | None:
    """Return what keeps a folder from being read, or None."""
    try:
        dataset = TraceDataset(folder)
        for _ in dataset.sequences("all", COLUMNS):
            pass
        return None if dataset.available else "nothing"
    except ExpertSpeculationError as error:
        return str(error)


def faults_of(folder: Path) -> list[str]:
    """Return what `verify` says, as a fault or as a refusal."""
    try:
        return [str(fault) for fault in verify(folder)]
    except ExpertSpeculationError as error:
        return [str(error)]


def peak() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(sound: Path, folders: list[Path]) -> None:
    pa.set_memory_pool(pa.system_memory_pool())
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, resource.RLIM_INFINITY))
    assert faults_of(sound) == [] and read_all(sound) is None
    before = peak()
    for folder in folders:
        facts: dict[str, Any] = {"folder": folder.name}
        try:
            facts |= {"verify": faults_of(folder), "read": read_all(folder)}
        except BaseException:
            facts["crash"] = traceback.format_exc()
        print(json.dumps(facts | {"grown": peak() - before}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
