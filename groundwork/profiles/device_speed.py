"""How fast a GPU, or the CPU in its place, reads weights, multiplies, runs a layer's operations and takes copies.

Each function returns the median of several repetitions, after two that do not count. torch is imported inside them.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from groundwork.errors import ExpertSpeculationError
from groundwork.hardware import describe_device
from groundwork.profiles.hardware import Channel

if TYPE_CHECKING:
    import torch

SMALL_COPY = 64  # bytes, which take no time beside what it takes to start a copy
_WIDTH = 4096


def memory_bandwidth(device: "torch.device", size: int, repetitions: int = 7) -> float:
    """Return the bytes per second at which `size` bytes of weights are read to multiply one vector, as in decoding.

    Weights are bfloat16 on a GPU, float32 on a CPU, whose 16-bit products are often slower than its memory.
    """
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = max(size // (_WIDTH * dtype.itemsize), 1)
    weights = torch.ones(rows, _WIDTH, dtype=dtype, device=device)
    vector, result = (torch.ones(n, dtype=dtype, device=device) for n in (_WIDTH, rows))
    return weights.nbytes / _seconds(lambda: torch.mv(weights, vector, out=result), device, repetitions)


def matmul_rate(device: "torch.device", width: int | None = None, repetitions: int = 7) -> float:
    """Return the operations per second of the product of two square bfloat16 matrices, `width` wide."""
    import torch

    width = width or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (
        torch.randn(width, width, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(2)
    )
    result = torch.empty_like(left)
    return 2 * width**3 / _seconds(lambda: torch.mm(left, right, out=result), device, repetitions)


def layer_overhead(device: "torch.device", layers: int = 50, repetitions: int = 7) -> float:
    """Return the seconds that torch takes for one layer and token whose weights are next to nothing.

    The layer has the operations of a mixture-of-experts layer with 8 experts, 2 a token; the host reads the chosen
    ones, as an engine that fetches experts must. Operations are launched one by one, without CUDA graphs.
    """
    import torch

    layer = _tiny_layer(device)

    def decode() -> None:
        for _ in range(layers):
            layer()

    with torch.inference_mode():
        return _wall_seconds(decode, device, repetitions) / layers


def link_speed(device: "torch.device", size: int = 2**26, repetitions: int = 7) -> Channel:
    """Return how fast (on a GPU, pinned) host memory is copied to the device: a line through copies of two sizes.

    A copy counts from the call until the host knows of its end.
    """
    import torch

    def seconds(count: int) -> float:
        source = torch.ones(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty(count, dtype=torch.uint8, device=device)
        return _wall_seconds(lambda: target.copy_(source, non_blocking=True), device, repetitions)

    small, large = seconds(SMALL_COPY), seconds(size)
    if large <= small:
        raise ExpertSpeculationError(
            f"{describe_device(device)}: copying {size} bytes took no longer than {SMALL_COPY}; "
            "measure again while nothing else runs"
        )
    return Channel((size - SMALL_COPY) / (large - small), small)


def _seconds(run: Callable[[], object], device: "torch.device", repetitions: int) -> float:
    """Return the median time of `run` on the device itself: on a GPU between two events of its stream."""
    if device.type != "cuda":
        return _wall_seconds(run, device, repetitions)
    import torch

    found: list[float] = []
    with torch.cuda.device(device):
        for _ in range(repetitions + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
    return median(found[2:])  # the first ones load kernels and wake the clock


def _wall_seconds(run: Callable[[], object], device: "torch.device", repetitions: int) -> float:
    """Return the median time from the call of `run` until the host knows that the device is done."""
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    finish()
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        run()
        finish()
        found.append(time.perf_counter() - start)
    return median(found[2:])


def _tiny_layer(device: "torch.device") -> Callable[[], "torch.Tensor"]:
    """Return a function that decodes one token in one layer: width 64, 4 heads, 16 cached tokens."""
    import torch
    from torch.nn import functional

    width, heads, experts, chosen, cached = 64, 4, 8, 2, 16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)

    def random_weights(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(*shape, dtype=dtype, device=device, generator=generator) / width**0.5
        return drawn

    token, router, norm = random_weights(1, width), random_weights(experts, width), random_weights(width)
    query, key, value, output = (random_weights(width, width) for _ in range(4))
    keys, values = (random_weights(1, heads, cached, width // heads) for _ in range(2))
    gates, ups, downs = (random_weights(experts, width, width) for _ in range(3))

    def layer() -> torch.Tensor:
        normed = functional.rms_norm(token, (width,), norm)
        asked = functional.linear(normed, query).view(1, heads, 1, -1)
        keys[:, :, -1:] = functional.linear(normed, key).view(1, heads, 1, -1)
        values[:, :, -1:] = functional.linear(normed, value).view(1, heads, 1, -1)
        attended = functional.scaled_dot_product_attention(asked, keys, values).reshape(1, width)
        hidden = token + functional.linear(attended, output)
        normed = functional.rms_norm(hidden, (width,), norm)
        weights, ids = functional.linear(normed, router).softmax(-1).topk(chosen)
        for rank, expert in enumerate(ids[0].tolist()):
            gated = functional.silu(functional.linear(normed, gates[expert])) * functional.linear(normed, ups[expert])
            hidden = hidden + weights[:, rank : rank + 1] * functional.linear(gated, downs[expert])
        return hidden

    return layer
