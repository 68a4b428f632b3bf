"""The collection run: texts are drawn, the model is loaded, a plan is saved, and batch after batch becomes shards."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from collection.plan import Layout, make_plan, make_spec
from collection.preparation import prepare, shortfall
from collection.settings import CollectSettings
from collection.tokens import TokenText
from collection.tracing import trace_shards
from groundwork.errors import ConfigurationError, IncompleteError
from groundwork.hardware import describe_device
from groundwork.progress import log
from moe.load import LoadedModel, load_model
from moe.resident import ResidentTracer
from moe.routers import find_routers
from traces.card import write_card
from traces.plan import estimated_bytes_per_token
from traces.run_folder import begin, check_free_space, writing

__all__ = ["CollectResult", "CollectSettings", "collect", "dry_run"]


@dataclass(frozen=True)
class CollectResult:
    """What a run wrote; `sources` are the plan's records, `padding_share` is of the positions run through the model."""

    run_dir: Path
    sequences: int
    tokens: int
    shards: int
    sources: list[dict[str, Any]]
    padding_share: float
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self) | {"run_dir": str(self.run_dir)}


def collect(settings: CollectSettings) -> CollectResult:
    """Trace the texts that `settings` name and write them as a run folder, or finish the one that is resumed.

    Raises ConfigurationError for anything that can not work, if possible before weights are loaded, and IncompleteError
    once all is written where a source had fewer usable texts than its share. KeyboardInterrupt leaves a run that
    `resume` continues.
    """
    started = time.monotonic()
    prepared = prepare(settings)
    settings, layout, run_dir = prepared.settings, prepared.layout, prepared.run_dir
    with writing(run_dir):
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            attn_implementation=settings.attn_implementation,
            experts_implementation=settings.experts_implementation,
        )
        _check_tokens(loaded, layout)
        routers = find_routers(loaded.model)
        plan = make_plan(layout, prepared.draws, make_spec(loaded, routers, settings), prepared.identity, loaded)
        check_free_space(run_dir, plan)
        plan, finished = begin(run_dir, plan, resume=settings.resume)
        with ResidentTracer(loaded.model, routers, store=plan.spec.store, horizons=plan.spec.horizons) as tracer:
            trace_shards(run_dir, plan, layout, finished, tracer, TokenText(loaded.tokenizer))
        write_card(run_dir)
    result = CollectResult(
        run_dir=run_dir,
        sequences=len(layout.sequences),
        tokens=sum(layout.num_tokens_S),
        shards=len(plan.shards),
        sources=plan.sources,
        padding_share=layout.padding_share,
        seconds=time.monotonic() - started,
    )
    log(
        f"{run_dir}: {result.sequences} sequences, {result.tokens} tokens, {result.shards} shards, traced on "
        f"{describe_device(loaded.device)}; {result.padding_share:.1%} of the positions were padding"
    )
    if result.sequences < settings.target_traces:
        raise IncompleteError(f"{run_dir}: holds {shortfall(prepared.draws)}")
    return result


def dry_run(settings: CollectSettings) -> dict[str, Any]:
    """Return what `collect` would do, as JSON-ready values, without loading weights or writing anything.

    `bytes` is an estimate. Raises ConfigurationError as `collect` does.
    """
    prepared = prepare(settings)
    layout, spec = prepared.layout, prepared.spec
    tokens = sum(layout.num_tokens_S)
    return {
        "run_dir": str(prepared.run_dir),
        "model": prepared.model,
        "device": describe_device(prepared.device),
        "store": list(spec.store),
        "lookahead": spec.horizons,
        "sources": [each.facts for each in prepared.draws],
        "sequences": len(layout.sequences),
        "tokens": tokens,
        "shards": len(layout.shards),
        "batches": len(layout.batches),
        "padding_share": layout.padding_share,
        "bytes": round(tokens * estimated_bytes_per_token(spec)),
    }


def _check_tokens(loaded: LoadedModel, layout: Layout) -> None:
    """Raise ConfigurationError where the tokenizer gives ids that the model does not know."""
    highest = max(int(sequence.token_ids_T.max()) for sequence in layout.sequences)
    embeddings: torch.Tensor = loaded.model.get_input_embeddings().weight  # type: ignore[assignment]
    known = embeddings.shape[0]
    if highest >= known:
        raise ConfigurationError(
            f"{loaded.name}: its tokenizer gives token id {highest}, but the model knows {known}; put the model's own "
            "tokenizer files into its folder"
        )
