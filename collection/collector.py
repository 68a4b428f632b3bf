"""The collection run: texts are drawn, the model is loaded, a plan is saved, and batch after batch becomes shards."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collection.datasets import resolve
from collection.plan import Layout, differing_fields, lay_out, make_plan, make_spec
from collection.sampling import Draw, draw
from collection.settings import CollectSettings
from collection.tokens import TokenText
from groundwork.atomic import write_bytes
from groundwork.errors import ConfigurationError, IncompleteError
from groundwork.hardware import choose_device, describe_device
from groundwork.progress import log, progress
from groundwork.provenance import library_versions
from moe.load import LoadedModel, describe_model, load_model, load_tokenizer
from moe.resident import BatchRouting, ResidentTracer
from moe.routers import find_routers
from traces.card import write_card
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.plan import PLAN_NAME, Plan, PlannedShard, estimated_bytes_per_token
from traces.schema import PHASES, SequenceTrace, TraceSpec
from traces.writer import ShardWriter, file_sha256, lock_run

__all__ = ["CollectResult", "CollectSettings", "collect", "dry_run"]

SPARE_SPACE = 1.2  # sizes are estimates: this many times the estimate must be free
OWN_FILES = {".lock", ".tmp"}  # left by a run that was stopped before it had a plan


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


def collect(settings: CollectSettings) -> CollectResult:
    """Trace the texts that `settings` name and write them as a run folder.

    Raises ConfigurationError for anything that can not work, if possible before weights are loaded, and IncompleteError
    once all is written where a source had fewer usable texts than its share.
    """
    started = time.monotonic()
    run_dir, draws = _prepare(settings)
    loaded = load_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        attn_implementation=settings.attn_implementation,
        experts_implementation=settings.experts_implementation,
    )
    routers = find_routers(loaded.model)
    spec = make_spec(loaded, routers, settings)
    layout = lay_out(draws, spec, settings)
    _check_fit(loaded, layout, settings)
    plan = make_plan(layout, draws, spec, settings, loaded)
    _check_free_space(run_dir, plan)
    with lock_run(run_dir):
        plan, finished = _begin(run_dir, plan, settings)
        with ResidentTracer(loaded.model, routers, store=plan.spec.store, horizons=plan.spec.horizons) as tracer:
            _trace(run_dir, plan, layout, finished, tracer, TokenText(loaded.tokenizer))
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
        f"{run_dir}: {result.sequences} sequences, {result.tokens} tokens, {result.shards} shards on "
        f"{describe_device(loaded.device)}; {result.padding_share:.1%} of the positions were padding"
    )
    _require_complete(draws, f"{run_dir}: holds")
    return result


def dry_run(settings: CollectSettings) -> dict[str, Any]:
    """Return what `collect` would do, as JSON-ready values, without loading weights or writing anything.

    `bytes` is an estimate. Raises ConfigurationError as `collect` does.
    """
    description = describe_model(settings.model, settings.dtype)
    run_dir, draws = _prepare(settings)
    spec = TraceSpec(
        model_name=description["name"],
        model_revision=description["revision"],
        num_layers=description["num_layers"],
        num_experts=description["num_experts"],
        top_k=description["top_k"],
        moe_layers=tuple(description["moe_layers"]),
        expert_order="weight",
        weights_normalized=description["weights_normalized"],
        quantization=settings.quantization,
        model_dtype=description["dtype"],
        router_dtype=description["dtype"],
        attn_implementation=settings.attn_implementation,
        experts_implementation=settings.experts_implementation,
        library_versions=library_versions(),
        tokenizer_hash=None,
        seed=settings.seed,
        plan_fingerprint="",
        store=_fitting_columns(settings, description["num_layers"]),
        horizons=settings.horizons,
    )
    layout = lay_out(draws, spec, settings)
    tokens = sum(layout.num_tokens_S)
    return {
        "run_dir": str(run_dir),
        "model": description,
        "device": describe_device(choose_device(settings.device)),
        "store": list(spec.store),
        "lookahead": spec.horizons,
        "sources": [each.facts for each in draws],
        "sequences": len(layout.sequences),
        "tokens": tokens,
        "shards": len(layout.shards),
        "batches": len(layout.batches),
        "padding_share": layout.padding_share,
        "bytes": round(tokens * estimated_bytes_per_token(spec)),
    }
