"""How fast a disk gives what is not in the page cache: a whole expert at a time, and a small piece anywhere."""

import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.profiles.hardware import Channel
from groundwork.progress import log

READ_BYTES = 2**24  # about an expert of gpt-oss-20b
SMALL_READ = 4096  # bytes
FASTEST_DISK_S = 5e-6  # of a small read; the page cache needs 1 to 2 us
_LEAST_BYTES = 2**26
_WRITING_S = 8.0


def disk_speed(folder: Path, size: int = 10**9, passes: int = 3) -> Channel:
    """Return how fast a file in `folder` is read that is not in the page cache: 16 MiB at a time, and 4 KiB anywhere.

    Writes a file of `size` bytes there, or less where a quarter of the free space is less or writing would take longer
    than eight seconds, and removes it. Caches of the drive, or of a host beneath a virtual machine, are not avoided.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: not a folder; name one on the disk that is to be measured")
    if not hasattr(os, "posix_fadvise"):
        raise ConfigurationError(f"{folder}: this system can not drop its page cache; write a profile instead")
    free = shutil.disk_usage(folder).free
    if free // 4 < min(size, _LEAST_BYTES):
        raise ConfigurationError(
            f"{folder}: {free / 1e6:.0f} MB are free, too few to measure with; name another folder"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".measuring-", buffering=0) as file:
            written = _write(file.fileno(), min(size, free // 4))
            if written < size:
                log(f"{folder}: measured with {written / 1e6:.0f} MB, for space or speed")
            rate = median(written / _read_all(file.fileno(), written) for _ in range(passes))
            latency = _read_latency(file.fileno(), written)
    except OSError as error:
        raise ConfigurationError(f"{folder}: {error.strerror}; name a folder that can be written to") from error
    if latency < FASTEST_DISK_S:
        raise ConfigurationError(
            f"{folder}: small reads take {latency * 1e6:.1f} us, which only memory can; name a folder on a disk"
        )
    return Channel(rate, latency)


def _write(descriptor: int, size: int) -> int:
    """Write and flush up to `size` bytes, which do not compress, in eight seconds or so; returns how many."""
    block = random.Random(0).randbytes(READ_BYTES)
    written, started = 0, time.perf_counter()
    while written < size:
        written += os.write(descriptor, block[: size - written])
        if written >= _LEAST_BYTES:
            os.fsync(descriptor)
            if time.perf_counter() - started > _WRITING_S:
                break
    os.fsync(descriptor)
    return written


def _drop_cache(descriptor: int) -> None:
    """Have the kernel forget the file's pages, which are on the disk already."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_all(descriptor: int, size: int) -> float:
    """Return the seconds in which the file is read from its beginning."""
    _drop_cache(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer, done, started = bytearray(READ_BYTES), 0, time.perf_counter()
    while done < size:
        count = os.preadv(descriptor, [buffer], done)
        if not count:
            raise ExpertSpeculationError(f"the file to measure ended after {done} of {size} bytes; measure again")
        done += count
    return time.perf_counter() - started


def _read_latency(descriptor: int, size: int, reads: int = 50) -> float:
    """Return the median seconds of one small read at a place of the file that is far from the others."""
    _drop_cache(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or the kernel would read ahead
    places = list(range(0, size - SMALL_READ + 1, max(size // reads // SMALL_READ, 1) * SMALL_READ))
    random.Random(0).shuffle(places)
    buffer, found = bytearray(SMALL_READ), []
    for place in places[:reads]:
        started = time.perf_counter()
        os.preadv(descriptor, [buffer], place)
        found.append(time.perf_counter() - started)
    return median(found)
