"""Several processes that train one predictor, as `torchrun` starts them; one process alone is a group of one.

Every process computes the gradients of its own micro-batches; one sum over the group makes them the effective batch's.
Weights then stay equal without being sent, since all take the same step from the same start.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from groundwork.hardware import choose_device

TIMEOUT = timedelta(minutes=30)  # a process may wait for another's validation


@dataclass(frozen=True)
class Group:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Group:
        """The place that torchrun gave this process; alone where it was not started by torchrun."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def leads(self) -> bool:
        """Whether this process writes files and keeps the clock."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device called `name`; of several GPUs each process of a machine takes the one of its number."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        return choose_device(name)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Silences progress and logs of every process but the first; errors leave the block and are heard."""
        with Path(os.devnull).open("w") as nowhere, nullcontext() if self.leads else redirect_stderr(nowhere):
            yield

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Holds the connection between the processes."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def sum_numbers(self, numbers: Iterable[float], device: torch.device) -> list[float]:
        """Each number's sum over the processes."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(list(numbers), dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return [float(each) for each in values.tolist()]

    def smallest(self, number: int, device: torch.device) -> int:
        """The least of the processes' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=device)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def sum_gradients(self, module: nn.Module, extra: Iterable[float]) -> list[float]:
        """Adds the group's gradients up in place, missing ones as zeros, and returns the sums of `extra`.

        The extra numbers travel along: loss and flags cost no second exchange.
        """
        for parameter in module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        numbers = list(extra)
        if self.size == 1:
            return numbers
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        last = torch.tensor(numbers, dtype=torch.float32, device=gradients[0].device)
        whole = torch.cat([*(gradient.reshape(-1) for gradient in gradients), last])
        dist.all_reduce(whole)
        sizes = [*(gradient.numel() for gradient in gradients), len(numbers)]
        *parts, sums = whole.split(sizes)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return [float(each) for each in sums.tolist()]


ALONE = Group()
