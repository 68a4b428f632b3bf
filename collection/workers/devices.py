"""Which devices of this machine a run is given: one, several in a list, or all GPUs."""

import torch

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device


def split_devices(names: str) -> list[str]:
    """Return the devices of `--device`, one as it is; raises ConfigurationError for one that is not there.

    `all` are all GPUs; a GPU may be named once only, while `cpu,cpu` are two processes that share the processors.
    """
    if names == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigurationError("--device all: stands for all GPUs, and this machine has none; use cpu or auto")
        return [f"cuda:{index}" for index in range(count)]
    if "," not in names:
        return [names]
    devices = [str(choose_device(name.strip())) for name in names.split(",")]
    twice = [device for device in devices if device != "cpu" and devices.count(device) > 1]
    if twice:
        raise ConfigurationError(f"--device {names}: names {twice[0]} twice; name each GPU once")
    if len({torch.device(device).type for device in devices}) > 1:
        raise ConfigurationError(
            f"--device {names}: values differ between kinds of device; name GPUs alone, or processors alone"
        )
    return devices
