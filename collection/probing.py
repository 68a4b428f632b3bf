"""`--batch_size auto`: the largest batch of the longest sequences that fits, found by running some through the model.

A batch fits if the model runs it without an out-of-memory error and stays within a share of the memory that was free:
on a CPU the system would end the process rather than raise an error. So a batch is not even tried where the memory of
the last one, grown in proportion, would be too much. Batches double until one does not fit, then halve the distance.
"""

import contextlib
from pathlib import Path

import torch

from collection.plan import Layout
from collection.running import BatchRunner, is_out_of_memory, release_memory
from groundwork.errors import ExpertSpeculationError
from groundwork.hardware import free_memory_bytes, peak_memory_bytes
from groundwork.progress import log

MOST_TOKENS = 65536  # padded; the largest preset: no device gains from more
_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the memory free before probing; other programs use a CPU's, too


def fitting_batch_tokens(runner: BatchRunner, layout: Layout) -> int:
    """Return the padded tokens of the largest batch of the run's longest sequences that fits beside the model.

    Raises ExpertSpeculationError where not even one of them does.
    """
    lengths_S = layout.num_tokens_S
    longest = sorted(range(len(lengths_S)), key=lambda each: (-lengths_S[each], each))
    length = lengths_S[longest[0]]
    free = free_memory_bytes(runner.device)
    bound = _SHARE.get(runner.device.type, 0.5) * free
    fits, too_many = 0, min(max(MOST_TOKENS // length, 1), len(longest)) + 1
    bytes_each = 0.0
    failed = False
    while fits + 1 < too_many:
        size = (fits + too_many) // 2 if failed else min(max(2 * fits, 1), too_many - 1)
        used = None if size * bytes_each > bound else _memory_of(longest[:size], layout, runner)
        if used is None or used > bound:
            too_many, failed = size, True
        else:
            fits, bytes_each = size, used / size
    if fits == 0:
        raise ExpertSpeculationError(
            f"--batch_size auto: one sequence of {length} tokens does not fit in the {free / 1e9:.1f} GB that are free "
            f"beside the model on {runner.device}; free memory, or lower --max_length"
        )
    log(
        f"--batch_size auto: {fits} sequences of {length} tokens {'fit' if failed else 'are tried, and fit'}; "
        f"a batch is {fits * length} padded tokens"
    )
    return fits * length


def _memory_of(sequence_ids: list[int], layout: Layout, runner: BatchRunner) -> int | None:
    """Return the bytes that a batch takes beside the model, or None where it does not run for lack of memory."""
    device = runner.device
    before = _begin_peak(device)
    try:
        runner.run(sequence_ids, [layout.sequences[each] for each in sequence_ids])
        return max(_peak(device) - before, 0)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None


def _begin_peak(device: torch.device) -> int:
    """Begin to measure a peak anew, and return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):  # not Linux, or not allowed: then only growth beyond an earlier peak shows
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Return the most bytes in use since `_begin_peak`."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory_bytes(device)
    values = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(values["VmHWM"].split()[0]) * 1024
