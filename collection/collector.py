"""The collection run: texts are drawn, the model is loaded, a plan is saved, and batch after batch becomes shards."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from collection.batching import PRESETS, SMALLEST_PRESET
from collection.executing import EXECUTIONS
from collection.plan import lay_out_again, make_plan, make_spec, model_identity
from collection.preparation import prepare, shortfall
from collection.settings import CollectSettings
from collection.tokens import TokenText
from groundwork.hardware import describe_device
from groundwork.progress import log
from traces.card import write_card
from traces.plan import estimated_bytes_per_token
from traces.run_folder import begin, check_free_space, writing

__all__ = ["CollectResult", "CollectSettings", "collect", "dry_run"]


@dataclass(frozen=True)
class CollectResult:
    """What a run wrote; `sources` are the plan's records, `padding_share` is of the positions run through the model.

    `shortfall` says which sources had fewer usable texts than were asked of them, and is None where all had enough.
    """

    run_dir: Path
    sequences: int
    tokens: int
    shards: int
    sources: list[dict[str, Any]]
    batches: int
    padding_share: float
    shortfall: str | None
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
    settings, layout, run_dir = prepared.settings, prepared.layout, prepared.run_dir
    with writing(run_dir):
        with EXECUTIONS[settings.execution](settings, layout) as execution:
            loaded = execution.loaded
            spec = make_spec(loaded, execution.routers, settings)
            identity = prepared.identity | model_identity(loaded, execution.weights, spec)
            if settings.batch_size == "auto":
                settings = replace(settings, batch_size=None, batch_tokens=execution.fitting_batch_tokens(layout))
                layout = lay_out_again(layout, spec, settings)
                identity |= {"batch_size": None, "batch_tokens": settings.batch_tokens}
            plan = make_plan(layout, prepared.draws, spec, identity)
            check_free_space(run_dir, plan)
            plan, finished = begin(run_dir, plan, resume=settings.resume)
            execution.write_shards(run_dir, plan, layout, finished, TokenText(loaded.tokenizer))
        write_card(run_dir)
    result = CollectResult(
        run_dir=run_dir,
        sequences=len(layout.sequences),
        tokens=sum(layout.num_tokens_S),
        shards=len(plan.shards),
        sources=plan.sources,
        batches=len(layout.batches),
        padding_share=layout.padding_share,
        shortfall=shortfall(prepared.draws),
        seconds=time.monotonic() - started,
    )
    log(
        f"{run_dir}: {result.sequences} sequences, {result.tokens} tokens, {result.shards} shards, traced on "
        f"{describe_device(loaded.device)}; {result.padding_share:.1%} of the positions were padding"
    )
    return result


def dry_run(settings: CollectSettings) -> dict[str, Any]:
    """Return what `collect` would do, as JSON-ready values, without loading weights or writing anything.

    `bytes` is an estimate, and so are `batches` and `padding_share` where the batch is to be found by probing. Raises
    ConfigurationError as `collect` does.
    """
    prepared = prepare(settings)
    settings, layout, spec, loading = prepared.settings, prepared.layout, prepared.spec, prepared.loading
    tokens = sum(layout.num_tokens_S)
    return {
        "run_dir": str(prepared.run_dir),
        "model": prepared.model,
        "device": describe_device(loading.device),
        "quantization": loading.mode,
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
        "shortfall": shortfall(prepared.draws),
    }
