"""What this machine offers: which device to run on, and how much of its memory is free or was used.

torch is imported inside the functions, so that commands that need no model start quickly.
"""

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from groundwork.errors import ConfigurationError

if TYPE_CHECKING:
    import torch


def choose_device(name: str = "auto", part_of: str | None = None) -> "torch.device":
    """Return the device called `name`; `auto` is the GPU with most free memory, else the CPU.

    Raises ConfigurationError for a name that is unknown or not available here; it tells the whole value that the name
    is `part_of`.
    """
    import torch

    available = ["cpu"]
    available += [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        gpus = [torch.device(each) for each in available if each.startswith("cuda")]
        return max(gpus, key=free_memory_bytes) if gpus else torch.device("cpu")
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        part = "" if part_of in (None, name) else f"'{name}' is "
        raise ConfigurationError(
            f"--device {part_of or name}: {part}not a device of this machine; use 'auto' or one of "
            f"{', '.join(available)}"
        )
    return torch.device(wanted)


def choose_devices(names: str = "auto", part_of: str | None = None) -> "tuple[torch.device, ...]":
    """Return the devices that hold one model together, joined by plus signs: one of any kind, or several GPUs.

    Raises ConfigurationError as `choose_device` does, and where several are not different GPUs.
    """
    whole = part_of or names
    devices = tuple(choose_device(name.strip(), whole) for name in names.split("+"))
    if len(devices) > 1 and (len(set(devices)) < len(devices) or any(each.type != "cuda" for each in devices)):
        raise ConfigurationError(
            f"--device {whole}: a plus sign joins GPUs to hold one model together; name different GPUs, as "
            "cuda:0+cuda:1"
        )
    return devices


def free_memory_bytes(device: "torch.device") -> int:
    """Return the bytes that can still be allocated on `device`; on a CPU within the container's limit."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min(free, _free_in_container())


def describe_device(*devices: "torch.device") -> str:
    """Return the name and memory of a device, or of several that hold a model together, as a reader would say it."""
    import torch

    if len(devices) > 1:
        return " + ".join(describe_device(each) for each in devices)
    (device,) = devices
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.total_memory / 1e9:.0f} GB)"
    if device.type == "cpu":
        return f"CPU ({_processor()}, {torch.get_num_threads()} threads)"
    return str(device)


def peak_memory_bytes(device: "torch.device") -> int:
    """Return the most memory this process has used so far: allocated by torch on a GPU, resident set on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes: getrusage(2)


def _free_in_container() -> int:
    """Return what is left below the cgroup v2 memory limit, file cache counted as free; no limit gives 2**63."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return 2**63
        used = int((folder / "memory.current").read_text())
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(int(limit) - used + int(cache.get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return 2**63


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
