"""The hardware profile of this machine, measured in under a minute: what `simulate --hardware measure` uses.

On a machine without a GPU the CPU stands for it: its memory is the GPU's, its torch threads compute, and the link is a
copy from memory to memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device, describe_device, free_memory_bytes
from groundwork.profiles.device_speed import layer_overhead, link_speed, matmul_rate, memory_bandwidth
from groundwork.profiles.disk_speed import disk_speed
from groundwork.profiles.hardware import HardwareProfile
from groundwork.progress import log

if TYPE_CHECKING:
    import torch

MOST_RESERVED = 2e9  # bytes, as in the packaged profiles


@dataclass(frozen=True)
class Effort:
    """How much is moved and computed; bytes, and the numbers of layers and of repetitions."""

    memory_bytes: int = 2**29
    matmul_width: int | None = None
    """Of square matrices; None: 8192 on a GPU, 1024 on a CPU."""
    layers: int = 50
    link_bytes: int = 2**26
    disk_bytes: int = 10**9
    repetitions: int = 7


def measure_hardware(folder: Path, device: str = "auto", effort: Effort | None = None) -> HardwareProfile:
    """Return the profile of this machine, with the disk that `folder` is on; says on stderr what it is doing.

    Raises ConfigurationError for a device that is not here, and for a folder that can not be measured.
    """
    effort, chosen = effort or Effort(), choose_device(device)
    if chosen.type not in ("cuda", "cpu"):
        raise ConfigurationError(f"--device {device}: only CUDA GPUs and CPUs can be measured; write a profile instead")
    free, ram = free_memory_bytes(chosen), free_memory_bytes(choose_device("cpu"))
    log(f"measuring {describe_device(chosen)}: memory, matrix products, layers and copies")
    memory = memory_bandwidth(chosen, min(effort.memory_bytes, free // 4), effort.repetitions)
    rate = matmul_rate(chosen, effort.matmul_width, effort.repetitions)
    overhead = layer_overhead(chosen, effort.layers, effort.repetitions)
    link = link_speed(chosen, min(effort.link_bytes, ram // 8), effort.repetitions)
    log(f"measuring the disk of {folder}")
    disk = disk_speed(folder, effort.disk_bytes)
    reserved = min(MOST_RESERVED, free / 10)
    return HardwareProfile(
        name=f"this machine, {describe_device(chosen)}",
        source=_source(chosen),
        gpu_memory_gb=free / 1e9,
        memory_gb_s=memory / 1e9,
        compute_tflops=rate / 1e12,
        layer_overhead_us=overhead * 1e6,
        link_gb_s=link.bytes_per_s / 1e9,
        link_latency_us=link.latency_s * 1e6,
        disk_gb_s=disk.bytes_per_s / 1e9,
        disk_latency_us=disk.latency_s * 1e6,
        ram_gb=ram / 1e9,
        reserved_gb=reserved / 1e9,
    )


def _source(device: "torch.device") -> str:
    import torch

    on_gpu = device.type == "cuda"
    lines = [
        f"Measured with torch {torch.__version__} on {describe_device(device)}; GPU memory and RAM are what was free.",
        "layer_overhead_us: operations launched one by one from Python; engines with CUDA graphs need less.",
        "reserved_gb: assumption, a tenth of the memory and at most 2 GB.",
    ]
    if not on_gpu:
        lines.append("There is no GPU: the CPU and its memory stand for it, and the link copies from memory to memory.")
    return "\n".join(lines) + "\n"
