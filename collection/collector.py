"""The collection run: texts are drawn, the model is loaded, a plan is saved, and batch after batch becomes shards."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from collection.batching import PRESETS, SMALLEST_PRESET
from collection.executing import EXECUTIONS
from collection.forecast import Forecast, possible_executions
from collection.measuring import measure_rates
from collection.output import LOCAL
from collection.pass_state import WORKING_FOLDER, PassState, state_folders
from collection.plan import Layout, lay_out_again, make_plan, make_spec, model_identity
from collection.preparation import Prepared, prepare, shortfall
from collection.settings import CollectSettings
from collection.tokens import TokenText
from collection.workers.working import write_with_workers
from groundwork.disk import free_bytes
from groundwork.hardware import describe_device
from groundwork.progress import log
from traces.card import write_card
from traces.plan import Plan, estimated_bytes_per_token
from traces.run_folder import begin, check_free_space, writing

__all__ = ["CollectResult", "CollectSettings", "collect", "dry_run"]


@dataclass(frozen=True)
class CollectResult:
    """What a run wrote; `sources` are the plan's records, `padding_share` is of the positions run through the model.

    `shortfall` says which sources had fewer usable texts than were asked of them, and is None where all had enough;
    `forecast` holds, of a run that was measured first, the seconds that were foretold and those that it took.
    """

    run_dir: Path
    sequences: int
    tokens: int
    shards: int
    sources: list[dict[str, Any]]
    batches: int
    padding_share: float
    shortfall: str | None
    forecast: dict[str, float] | None
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self) | {"run_dir": str(self.run_dir)}


def collect(settings: CollectSettings) -> CollectResult:
    """Trace the texts that `settings` name and write them as a run folder, or finish the one that is resumed.

    Raises ConfigurationError for anything that can not work, if possible before weights are loaded, and IncompleteError
    where there is no usable text at all; fewer than asked for is a `shortfall` of the result. KeyboardInterrupt leaves
    a run that `resume` continues.
    """
    started = time.monotonic()
    prepared = prepare(settings)
    with_workers = settings.engine == "ray" or len(prepared.devices) > 1
    run_dir = prepared.run_dir
    forecast = _forecast(prepared) if settings.measure and not with_workers else None
    if settings.measure and with_workers:
        log("--measure has no effect on a run of several workers")
    with writing(run_dir):
        worked = _write_with_workers(prepared) if with_workers else _write(prepared)
        write_card(run_dir)
    plan, layout = worked.plan, worked.layout
    result = CollectResult(
        run_dir=run_dir,
        sequences=len(layout.sequences),
        tokens=sum(layout.num_tokens_S),
        shards=len(plan.shards),
        sources=plan.sources,
        batches=len(layout.batches),
        padding_share=layout.padding_share,
        shortfall=shortfall(prepared.draws),
        forecast=_compared(forecast, prepared.settings, worked) if forecast else None,
        seconds=time.monotonic() - started,
    )
    log(
        f"{run_dir}: {result.sequences} sequences, {result.tokens} tokens, {result.shards} shards, traced "
        f"{prepared.settings.execution} on {worked.device}; {result.padding_share:.1%} of the positions were padding"
    )
    return result


@dataclass(frozen=True)
class _Worked:
    """What was worked off, the shards that were there before, the device in words, and the seconds that it took."""

    plan: Plan
    layout: Layout
    finished: set[int]
    device: str
    starting: float
    tracing: float


def _write(prepared: Prepared) -> _Worked:
    """Write the shards in this process."""
    settings, layout, run_dir = prepared.settings, prepared.layout, prepared.run_dir
    begun = time.monotonic()
    with EXECUTIONS[settings.execution](settings, layout) as execution:
        loaded, ready = execution.loaded, time.monotonic()
        spec = make_spec(loaded, execution.routers, settings)
        identity = prepared.identity | model_identity(loaded, execution.weights, spec)
        if settings.batch_size == "auto":
            settings = replace(settings, batch_size=None, batch_tokens=execution.fitting_batch_tokens(layout))
            layout = lay_out_again(layout, spec, settings)
            identity |= {"batch_size": None, "batch_tokens": settings.batch_tokens}
        plan = make_plan(layout, prepared.draws, spec, identity)
        check_free_space(run_dir, plan)
        plan, finished = begin(run_dir, plan, resume=settings.resume)
        taken_up = {run_dir / WORKING_FOLDER} if settings.execution == "streamed" else set()
        for folder in set(state_folders(run_dir)) - taken_up:  # of another execution, or of workers
            PassState.clear(folder)
        execution.write_shards(run_dir, plan, layout, finished, TokenText(loaded.tokenizer), LOCAL)
        done = time.monotonic()
    return _Worked(plan, layout, finished, describe_device(*loaded.devices), ready - begun, done - ready)


def _write_with_workers(prepared: Prepared) -> _Worked:
    """Write the shards in processes of their own, or on a cluster."""
    begun = time.monotonic()
    plan, finished, device = write_with_workers(prepared)
    return _Worked(plan, prepared.layout, finished, device, 0.0, time.monotonic() - begun)


def dry_run(settings: CollectSettings) -> dict[str, Any]:
    """Return what `collect` would do, as JSON-ready values, without loading weights or writing anything.

    `bytes` and what `executions` say are estimates, and so are `batches` and `padding_share` where the batch is to be
    found by probing. To `measure`, some weights are read after all, and those of a hub id fetched. Raises
    ConfigurationError as `collect` does.
    """
    prepared = prepare(settings)
    settings, layout, spec, loading = prepared.settings, prepared.layout, prepared.spec, prepared.loading
    tokens = sum(layout.num_tokens_S)
    return {
        "run_dir": str(prepared.run_dir),
        "model": prepared.model,
        "device": describe_device(*loading.devices),
        "devices": [settings.device, *prepared.devices[1:]],
        "quantization": loading.mode,
        "execution": settings.execution,
        "executions": _forecast(prepared).facts(),
        "memory_bytes": {"needed": loading.needed, "free": loading.free},
        "store": list(spec.store),
        "lookahead": spec.horizons,
        "sources": [each.facts for each in prepared.draws],
        "sequences": len(layout.sequences),
        "tokens": tokens,
        "shards": len(layout.shards),
        "batches": len(layout.batches),
        "batch_size": settings.batch_size,
        "batch_tokens": settings.batch_tokens,
        "batch_tokens_by_memory": {name: preset for name, (_, preset) in PRESETS.items()} | {"else": SMALLEST_PRESET},
        "padding_share": layout.padding_share,
        "bytes": round(tokens * estimated_bytes_per_token(spec)),
        "bytes_free": free_bytes(prepared.run_dir),
        "shortfall": shortfall(prepared.draws),
    }


def _forecast(prepared: Prepared) -> Forecast:
    """Return what each execution takes; to `measure` is to measure the one that was chosen."""
    settings, layout, loading = prepared.settings, prepared.layout, prepared.loading
    rates = measure_rates(settings, loading, layout) if settings.measure else None
    return Forecast(settings, possible_executions(settings), layout, prepared.spec, rates, loading.mode)


def _compared(forecast: Forecast, settings: CollectSettings, worked: _Worked) -> dict[str, float] | None:
    """Return the seconds that were foretold for the shards that were not finished beside those taken; say so."""
    left = [each for each in worked.plan.shards if each.index not in worked.finished]
    foretold = forecast.seconds(settings.execution, left)
    if foretold is None:
        return None
    seconds, taken = sum(foretold), worked.starting + worked.tracing
    log(
        f"foretold were {seconds:.1f} s, {foretold[0]:.1f} of them to start, and {taken:.1f} s were taken, "
        f"{worked.starting:.1f} to start: an error of {seconds / taken - 1:+.0%}"
    )
    return {
        "foretold_to_start": foretold[0],
        "foretold_to_trace": foretold[1],
        "taken_to_start": worked.starting,
        "taken_to_trace": worked.tracing,
        "error": seconds / taken - 1,
    }
