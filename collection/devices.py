"""Which devices a run is given, and which of them hold the model together: one a process, unless it is too large."""

from dataclasses import replace

import numpy as np
import torch

from collection.forecast import foresee
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_devices
from groundwork.progress import log
from moe.foresight import SHARE_FOR_WEIGHTS, TooLargeError


def split_devices(names: str) -> list[str]:
    """Return the device of each process, or its devices joined by plus signs, of those that `--device` names.

    `all` are all GPUs, and stands alone; a GPU may be named once only, while `cpu,cpu` are two processes that share
    the processors.
    Raises ConfigurationError for one that is not there.
    """
    if names == "all":
        if not _count_gpus():
            raise ConfigurationError("--device all: stands for all GPUs, and this machine has none; use cpu or auto")
        return [f"cuda:{index}" for index in range(_count_gpus())]
    if "," not in names:
        return [names]
    parts = [each.strip() for each in names.split(",")]
    if "" in parts:
        raise ConfigurationError(f"--device {names}: a comma without a device beside it; name one, or take it out")
    if "all" in parts:
        raise ConfigurationError(
            f"--device {names}: 'all' stands for all GPUs of this machine, which has {_count_gpus()}, and for nothing "
            "beside them; give it alone, or name the devices"
        )
    processes = [choose_devices(each, names) for each in parts]
    devices = [device for each in processes for device in each]
    twice = [device for device in devices if device.type != "cpu" and devices.count(device) > 1]
    if twice:
        raise ConfigurationError(f"--device {names}: names {twice[0]} twice; name each GPU once")
    if len({device.type for device in devices}) > 1:
        raise ConfigurationError(
            f"--device {names}: values differ between kinds of device; name GPUs alone, or processors alone"
        )
    return ["+".join(map(str, each)) for each in processes]


def check_devices(settings: CollectSettings, devices: list[str]) -> None:
    """Raise ConfigurationError for what several workers, or several devices, can not do."""
    several = len(devices) > 1 or "+" in settings.device
    if settings.engine == "ray" and several:
        raise ConfigurationError(
            f"--device {settings.device}: Ray gives each worker its device; leave the option out, or name a kind, "
            "cuda or cpu"
        )
    if settings.batch_size == "auto" and (several or settings.engine == "ray"):
        raise ConfigurationError(
            "--batch_size auto: probes one device, and all workers must cut the same batches; give --batch_tokens, or "
            "leave both out"
        )


def join_devices(settings: CollectSettings, devices: list[str]) -> list[str]:
    """Return GPUs joined, no more of them than needed, to hold a model that is too large for one and is not streamed.

    They stay as they are where one is enough, and where not even all of them are, while streaming is left to choose.
    Raises ConfigurationError as `foresee` does for all that is not the model's size.
    """
    several = len(devices) > 1 and all(name.startswith("cuda") and "+" not in name for name in devices)
    if not several or settings.engine == "ray" or settings.execution == "streamed":
        return devices
    joined = devices
    for size in range(1, len(devices) + 1):
        joined = ["+".join(each) for each in np.array_split(devices, len(devices) // size)]
        if all(_holds(settings, each) for each in joined):
            if size > 1:
                log(f"--device {settings.device}: one GPU can not hold the model, so it is spread: {', '.join(joined)}")
            return joined
    return joined if settings.execution == "resident" else devices  # the error then speaks of all


def _count_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _holds(settings: CollectSettings, device: str) -> bool:
    try:
        loading = foresee(replace(settings, device=device), "resident")
    except TooLargeError:
        return False
    return settings.execution == "resident" or loading.needed <= SHARE_FOR_WEIGHTS * loading.free
