"""Training within a memory budget: how many tokens a micro-batch may have, what ran out, and the peaks reached.

The budget holds for the device and for the host, each. On a GPU it is also enforced: torch refuses to allocate more,
which halves the micro-batch. On a CPU it rests on the predictor's estimate per token and on what
the process has in use.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import torch

from groundwork.errors import ConfigurationError
from groundwork.hardware import free_memory_bytes, peak_memory_bytes
from traces.schema import TraceSpec

LARGEST_MICRO_BATCH = {"cpu": 1024, "cuda": 16384}  # tokens; on a CPU more leave the cache and are slower
WORKING_SHARE = 0.5  # of what the budget leaves; the rest is for the optimizer's step, fragments and batches read ahead
# Bytes, where training runs on the host: kernels compiled for each length of micro-batch, decoded row groups, scoring.
# InterLayer on traces of gpt-oss-20b takes 0.65 GB in steps and 0.1 GB more with validation.
BESIDE_ON_CPU = 0.8e9
BYTES_PER_PARAMETER = 24  # weight, gradient, up to two moments, averaged weights, and copies in low precision


def micro_batch_tokens(
    device: torch.device, budget_gb: float, parameters: int, bytes_per_token: int, host_bytes_per_token: int
) -> int:
    """The most tokens that one forward and backward pass may take at once.

    `host_bytes_per_token` is what batches read ahead take. Raises ConfigurationError where the budget is too small for
    one token.
    """
    on_cpu = device.type != "cuda"
    weights = BYTES_PER_PARAMETER * parameters
    host_in_use = peak_memory_bytes(torch.device("cpu"))
    in_use = host_in_use if on_cpu else 0
    fixed = in_use + weights + (BESIDE_ON_CPU if on_cpu else 0)
    per_token = bytes_per_token + host_bytes_per_token
    available = in_use + free_memory_bytes(device)
    left = WORKING_SHARE * (min(budget_gb * 1e9, available) - fixed)
    on_host = WORKING_SHARE * (budget_gb * 1e9 - host_in_use)
    tokens = int(min(left / per_token, on_host / host_bytes_per_token))
    if tokens < 1:
        least = max(fixed + per_token / WORKING_SHARE, host_in_use + host_bytes_per_token / WORKING_SHARE)
        remedy = f"give at least {math.ceil(least / 1e7) / 100:g}"
        if available < least:
            remedy = f"{least / 1e9:.2g} GB are needed and {available / 1e9:.2g} GB are there; free memory"
        raise ConfigurationError(
            f"--memory_budget_gb {budget_gb:g}: too little for {in_use / 1e9:.2g} GB in use, {weights / 1e9:.2g} GB of "
            f"weights and optimizer, {(fixed - in_use - weights) / 1e9:.2g} GB beside them and "
            f"{per_token / 1e6:.2g} MB a token; {remedy} or make the predictor smaller"
        )
    # A power of two, so that a resumed training, with a little more or less free, comes to the same.
    return min(1 << (tokens.bit_length() - 1), LARGEST_MICRO_BATCH.get(device.type, LARGEST_MICRO_BATCH["cuda"]))


def packed_bytes_per_token(spec: TraceSpec, columns: Collection[str]) -> int:
    """What a token takes in a RoutingBatch with these columns: ids of 8 bytes, numbers of 4."""
    numbers = {"weights": spec.top_k, "logits": spec.num_experts, "lookahead": spec.horizons * spec.num_experts}
    return spec.num_layers * (8 * spec.top_k + 4 * sum(numbers.get(column, 0) for column in columns))


def enforce_budget(device: torch.device, budget_gb: float | None) -> None:
    """Has torch refuse to take more of a GPU than the budget; None lifts that. Nothing is enforced on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if budget_gb is None else min(1.0, budget_gb * 1e9 / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator raises a bare RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def forget_cached(device: torch.device) -> None:
    """Gives memory that torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peaks_gb(device: torch.device) -> dict[str, float]:
    """The most memory this process has used, in GB: resident on the host, and on a GPU allocated by torch."""
    found = {"peak_host_memory_gb": round(_host_peak_bytes() / 1e9, 3)}
    if device.type == "cuda":
        found["peak_device_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return found


def _host_peak_bytes() -> int:
    """VmHWM, which unlike getrusage's figure is not inherited from a parent process; elsewhere that figure."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes(torch.device("cpu"))
