"""Works a prepared run off with several workers: of this machine, or of a cluster."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from collection.passes import SHARE_FOR_STATES
from collection.plan import make_plan
from collection.preparation import Prepared
from collection.settings import CollectSettings
from collection.workers.cluster import RayWorkers
from collection.workers.driver import Driver, Workers, witness
from collection.workers.events import Facts
from collection.workers.local import LocalWorkers
from groundwork.errors import ConfigurationError
from groundwork.hardware import free_memory_bytes
from traces.plan import Plan
from traces.run_folder import begin, check_free_space


def needs_workers(settings: CollectSettings, devices: list[str]) -> bool:
    """Say whether a run is not this process's alone; raises ConfigurationError for what workers can not do."""
    if settings.engine == "local" and len(devices) == 1:
        return False
    if settings.engine == "ray" and len(devices) > 1:
        raise ConfigurationError(
            f"--device {','.join(devices)}: Ray gives each worker its device; leave the option out, or name a kind, "
            "cuda or cpu"
        )
    if settings.batch_size == "auto":
        raise ConfigurationError(
            "--batch_size auto: probes one device, and all workers must cut the same batches; give --batch_tokens, or "
            "leave both out"
        )
    return True


def write_with_workers(prepared: Prepared, devices: list[str]) -> tuple[Plan, set[int], str]:
    """Write a run's shards; returns its plan, the shards that were there before, and the devices in words.

    The caller holds the run's folder. Raises as `Driver.write_shards` does.
    """
    settings, layout, run_dir = prepared.settings, prepared.layout, prepared.run_dir.absolute()
    with witness(run_dir) as path, _workers(prepared, devices, path) as workers:
        driver = Driver(workers)
        facts = driver.facts()
        plan = make_plan(layout, prepared.draws, facts.spec, prepared.identity | facts.identity)
        check_free_space(prepared.run_dir, plan)
        plan, finished = begin(prepared.run_dir, plan, resume=settings.resume)
        pass_tokens = settings.pass_tokens if settings.execution == "streamed" else None
        driver.write_shards(run_dir, plan, set(finished), pass_tokens)
        return plan, finished, _spoken(facts, len(workers.names))


def _workers(prepared: Prepared, devices: list[str], path: Path) -> AbstractContextManager[Workers]:
    settings = prepared.settings
    if settings.engine == "ray":
        return RayWorkers(settings, prepared.layout, path)
    if settings.memory_budget_gb is None:  # what is free is free for all of them together
        share = SHARE_FOR_STATES * free_memory_bytes(torch.device("cpu")) / len(devices)
        settings = replace(settings, memory_budget_gb=share / 1e9)
    return LocalWorkers(settings, prepared.layout, devices, path)


def _spoken(facts: Facts, count: int) -> str:
    return f"{count} x {facts.device}"
