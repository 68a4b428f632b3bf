"""What comparing checksums adds to loading a packed model whole.

    python benchmarks/packed_checksums.py [--gigabytes 1.5] [--rounds 5]

writes a random Mixtral of that many bfloat16 gigabytes, packs it to NF4, and loads the pack on the CPU in turn with and
without its `packed.json`, all files in the page cache. Seconds are medians of the rounds.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from loading_memory import write_checkpoint

from moe.checksums import INDEX_NAME, check_folder
from moe.load import load_model
from moe.packed import pack


def seconds(folder: Path) -> float:
    started = time.perf_counter()
    load_model(str(folder), device="cpu")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        original, packed = Path(place) / "original", Path(place) / "packed"
        original.mkdir()
        write_checkpoint(original, arguments.gigabytes)
        index = pack(str(original), packed, device="cpu")
        size = sum(file["bytes"] for file in index["files"].values())
        compared, unread, alone = [], [], []
        seconds(packed)
        for _ in range(arguments.rounds):
            compared.append(seconds(packed))
            started = time.perf_counter()
            check_folder(packed)
            alone.append(time.perf_counter() - started)
            (packed / INDEX_NAME).rename(packed / "elsewhere")
            unread.append(seconds(packed))
            (packed / "elsewhere").rename(packed / INDEX_NAME)
    print(f"{size / 1e6:.0f} MB in {len(index['files'])} files")
    print(f"loaded, checksums compared   {median(compared):.2f} s ({min(compared):.2f} - {max(compared):.2f})")
    print(f"loaded without packed.json   {median(unread):.2f} s ({min(unread):.2f} - {max(unread):.2f})")
    print(f"comparing alone              {median(alone):.2f} s, {size / median(alone) / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
