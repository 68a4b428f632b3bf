"""Works a prepared run off with several workers: of this machine, or of a cluster."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from collection.passes import SHARE_FOR_STATES
from collection.plan import make_plan
from collection.preparation import Prepared
from collection.workers.cluster import RayWorkers
from collection.workers.driver import Driver, Workers, witness
from collection.workers.events import Facts
from collection.workers.local import LocalWorkers
from groundwork.hardware import free_memory_bytes
from traces.plan import Plan
from traces.run_folder import begin, check_free_space


def write_with_workers(prepared: Prepared) -> tuple[Plan, set[int], str]:
    """Write a run's shards; returns its plan, the shards that were there before, and the devices in words.

    The caller holds the run's folder. Raises as `Driver.write_shards` does.
    """
    settings, layout, run_dir = prepared.settings, prepared.layout, prepared.run_dir.absolute()
    with witness(run_dir) as path, _workers(prepared, path) as workers:
        driver = Driver(workers)
        facts = driver.facts()
        plan = make_plan(layout, prepared.draws, facts.spec, prepared.identity | facts.identity)
        check_free_space(prepared.run_dir, plan)
        plan, finished = begin(prepared.run_dir, plan, resume=settings.resume)
        pass_tokens = settings.pass_tokens if settings.execution == "streamed" else None
        driver.write_shards(run_dir, plan, set(finished), pass_tokens)
        return plan, finished, _spoken(facts, len(workers.names))


def _workers(prepared: Prepared, path: Path) -> AbstractContextManager[Workers]:
    settings = prepared.settings
    if settings.engine == "ray":
        return RayWorkers(settings, prepared.layout, path)
    if settings.memory_budget_gb is None:  # what is free is free for all of them together
        share = SHARE_FOR_STATES * free_memory_bytes(torch.device("cpu")) / len(prepared.devices)
        settings = replace(settings, memory_budget_gb=share / 1e9)
    return LocalWorkers(settings, prepared.layout, prepared.devices, path)


def _spoken(facts: Facts, count: int) -> str:
    return f"{count} x {facts.device}"
