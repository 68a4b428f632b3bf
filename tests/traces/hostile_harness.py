"""Opens and verifies hostile folders in a process of its own, with little memory.

`hostile_harness.py SOUND FOLDER...` prints one JSON line for each folder: what `verify` and `TraceDataset` said of it,
or what else was raised, and by how much the peak memory of the process has grown since it read the sound folder.
`hostile_harness.py --damage SHARD COUNT` does the same, in one line, for a shard that it damages so many times over.
"""

import json
import random
import resource
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa

from groundwork.errors import ExpertSpeculationError
from traces.reader import COLUMNS, TraceDataset
from traces.verify import verify


def read_all(folder: Path) -> str | None:
    """Return what keeps a folder from being read, or None."""
    try:
        dataset = TraceDataset(folder)
        for _ in dataset.sequences("all", COLUMNS):
            pass
        return None if dataset.available else "nothing in it"
    except ExpertSpeculationError as error:
        return str(error)


def faults_of(folder: Path) -> list[str]:
    """Return what `verify` says, as faults or as a refusal."""
    try:
        return [str(fault) for fault in verify(folder)]
    except ExpertSpeculationError as error:
        return [str(error)]


def peak() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_all(sound: Path, folders: list[Path]) -> None:
    assert faults_of(sound) == []
    assert read_all(sound) is None
    before = peak()
    for folder in folders:
        facts: dict[str, Any] = {}
        try:
            facts |= {"verify": faults_of(folder), "read": read_all(folder)}
        except BaseException:
            facts["crash"] = traceback.format_exc()
        print(json.dumps(facts | {"grown": peak() - before}), flush=True)


def damage(path: Path, count: int) -> None:
    """Change some bytes at a time: most often of what the footer says of columns, else of pages or of all the rest."""
    sound = path.read_bytes()
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    texts = sound.index(b"routing_trace", footer)
    regions = [(footer, texts)] * 3 + [(footer, len(sound)), (4, footer)]
    chance = random.Random(0)
    found: Counter[str] = Counter()
    before = peak()
    for _ in range(count):
        content = bytearray(sound)
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(*chance.choice(regions))
            content[at : at + chance.choice([0, 1, 1, 1, 4])] = chance.randbytes(chance.choice([0, 1, 1, 1, 4]))
        path.write_bytes(content)
        found["refused" if faults_of(path.parent) and read_all(path.parent) else "accepted"] += 1
    print(json.dumps(found | {"grown": peak() - before}))


if __name__ == "__main__":
    pa.set_memory_pool(pa.system_memory_pool())
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, resource.RLIM_INFINITY))
    if sys.argv[1] == "--damage":
        damage(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        open_all(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
