"""The collection run: texts are drawn, the model is loaded, a plan is saved, and batch after batch becomes shards."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from collection.datasets import resolve
from collection.plan import Layout, lay_out, make_plan, make_spec
from collection.sampling import Draw, draw
from collection.settings import CollectSettings
from collection.tokens import TokenText
from groundwork.errors import ConfigurationError, IncompleteError
from groundwork.hardware import choose_device, describe_device
from groundwork.progress import Progress, log, progress
from groundwork.provenance import library_versions
from moe.load import LoadedModel, describe_model, load_model, load_tokenizer
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.source import find_source
from traces.card import write_card
from traces.plan import Plan, estimated_bytes_per_token
from traces.run_folder import begin, check_folder, check_free_space
from traces.schema import PHASES, SequenceTrace, TraceSpec
from traces.writer import ShardWriter, lock_run

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
    """Trace the texts that `settings` name and write them as a run folder.

    Raises ConfigurationError for anything that can not work, if possible before weights are loaded, and IncompleteError
    once all is written where a source had fewer usable texts than its share.
    """
    started = time.monotonic()
    ready = _prepare(settings)
    settings = ready.settings
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
    layout = lay_out(ready.draws, spec, settings)
    _check_tokens(loaded, layout)
    run_dir, plan = ready.run_dir, make_plan(layout, ready.draws, spec, settings, loaded)
    check_free_space(run_dir, plan)
    with lock_run(run_dir):
        plan, finished = begin(run_dir, plan, resume=settings.resume)
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
        f"{run_dir}: {result.sequences} sequences, {result.tokens} tokens, {result.shards} shards, traced on "
        f"{describe_device(loaded.device)}; {result.padding_share:.1%} of the positions were padding"
    )
    if result.sequences < settings.target_traces:
        raise IncompleteError(f"{run_dir}: holds {_shortfall(ready.draws)}")
    return result


def dry_run(settings: CollectSettings) -> dict[str, Any]:
    """Return what `collect` would do, as JSON-ready values, without loading weights or writing anything.

    `bytes` is an estimate. Raises ConfigurationError as `collect` does.
    """
    ready = _prepare(settings)
    settings, model = ready.settings, ready.model
    spec = TraceSpec(
        model_name=model["name"],
        model_revision=model["revision"],
        num_layers=model["num_layers"],
        num_experts=model["num_experts"],
        top_k=model["top_k"],
        moe_layers=tuple(model["moe_layers"]),
        expert_order="weight",
        weights_normalized=model["weights_normalized"],
        quantization=settings.quantization,
        model_dtype=model["dtype"],
        router_dtype=model["dtype"],
        attn_implementation=settings.attn_implementation,
        experts_implementation=settings.experts_implementation,
        library_versions=library_versions(),
        tokenizer_hash=None,
        seed=settings.seed,
        plan_fingerprint="",
        store=settings.columns,
        horizons=settings.horizons,
    )
    layout = lay_out(ready.draws, spec, settings)
    tokens = sum(layout.num_tokens_S)
    return {
        "run_dir": str(ready.run_dir),
        "model": model,
        "device": describe_device(choose_device(settings.device)),
        "store": list(spec.store),
        "lookahead": spec.horizons,
        "sources": [each.facts for each in ready.draws],
        "sequences": len(layout.sequences),
        "tokens": tokens,
        "shards": len(layout.shards),
        "batches": len(layout.batches),
        "padding_share": layout.padding_share,
        "bytes": round(tokens * estimated_bytes_per_token(spec)),
    }


@dataclass(frozen=True)
class _Ready:
    """All that is known before weights are read: settings that fit the model, its description, the drawn texts."""

    settings: CollectSettings
    model: dict[str, Any]
    run_dir: Path
    draws: list[Draw]


def _prepare(settings: CollectSettings) -> _Ready:
    """Refuse what can be refused without weights, cheapest first, and draw the texts."""
    sources = resolve(settings.datasets, settings.dataset_root)
    model = describe_model(settings.model, settings.dtype)
    run_dir = settings.run_dir(model["name"])
    check_folder(run_dir, resume=settings.resume)
    if settings.horizons >= model["num_layers"]:
        raise ConfigurationError(
            f"--lookahead {settings.horizons}: must be below the {model['num_layers']} MoE layers of {model['name']}; "
            "lower it"
        )
    settings = _limit_length(settings, model)
    draws = draw(sources, load_tokenizer(settings.model), settings)
    if not any(each.sequences for each in draws):
        raise IncompleteError(f"{run_dir}: nothing was written, for there are {_shortfall(draws)}")
    return _Ready(settings, model, run_dir, draws)


def _limit_length(settings: CollectSettings, model: dict[str, Any]) -> CollectSettings:
    """Lower `max_length` to the number of positions that the model was made for, and say so."""
    config = AutoConfig.from_pretrained(find_source(settings.model).folder, trust_remote_code=False)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or settings.max_length <= limit:
        return settings
    log(f"{model['name']} reads at most {limit} tokens: --max_length {settings.max_length} is lowered to that")
    return replace(settings, max_length=limit)


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


def _trace(
    run_dir: Path, plan: Plan, layout: Layout, finished: set[int], tracer: ResidentTracer, text: TokenText
) -> None:
    """Run the unfinished shards' batches through the model and write each sequence as soon as its turn comes."""
    shard_of = plan.sequences["shard"].to_numpy()
    batches = {
        plan.shards[int(index)]: list(group)
        for index, group in groupby(layout.batches, key=lambda batch: shard_of[batch[0]])
        if index not in finished
    }
    total = sum(shard.num_tokens for shard in batches)
    bar: Progress[None] = progress(total=total, description="tracing", unit="token")
    with bar:
        for shard, own in batches.items():
            waiting: dict[int, SequenceTrace] = {}  # bounded by the windows that batches are cut from
            due = shard.first_sequence
            with ShardWriter(run_dir, plan.spec, shard) as writer:
                for batch in own:
                    for sequence in _trace_batch(batch, layout, plan.spec, tracer, text):
                        waiting[sequence.sequence_id] = sequence
                        bar.update(sequence.num_tokens)
                    while due in waiting:
                        writer.write(waiting.pop(due))
                        due += 1
                writer.commit()


def _trace_batch(
    batch: list[int], layout: Layout, spec: TraceSpec, tracer: ResidentTracer, text: TokenText
) -> Iterator[SequenceTrace]:
    """Run one right-padded batch and yield its sequences, cut to their lengths."""
    chosen = [layout.sequences[sequence_id] for sequence_id in batch]
    lengths_B = torch.tensor([len(sequence.token_ids_T) for sequence in chosen])
    input_ids_BT = torch.zeros(len(chosen), int(lengths_B.max()), dtype=torch.long)
    for row, sequence in enumerate(chosen):
        input_ids_BT[row, : lengths_B[row]] = torch.from_numpy(sequence.token_ids_T)
    routing = tracer.trace(input_ids_BT, lengths_B)
    for row, (sequence_id, sequence) in enumerate(zip(batch, chosen, strict=True)):
        tokens = len(sequence.token_ids_T)

        def cut(array_BT: torch.Tensor | None, row: int = row, tokens: int = tokens) -> NDArray[Any] | None:
            # A copy, so that a sequence that waits to be written does not keep its whole batch in memory.
            return None if array_BT is None else array_BT[row, :tokens].numpy().copy()

        ids_TLK = cut(routing.expert_ids_BTLK)
        assert ids_TLK is not None
        yield SequenceTrace(
            dataset=sequence.dataset,
            sequence_id=sequence_id,
            sequence_key=sequence.key,
            token_ids_T=sequence.token_ids_T,
            tokens_T=text.strings(sequence.token_ids_T.tolist()),
            phase_T=np.full(tokens, PHASES["prefill"], np.uint8),
            expert_ids_TLK=ids_TLK.astype(spec.id_dtype),
            routing_weights_TLK=cut(routing.routing_weights_BTLK) if "weights" in spec.store else None,
            router_logits_TLE=cut(routing.router_logits_BTLE),
            lookahead_logits_THLE=cut(routing.lookahead_logits_BTHLE),
        )


def _shortfall(draws: list[Draw]) -> str:
    """Say how many sequences there are of those asked for, and where the missing ones went."""
    asked, had = sum(each.requested for each in draws), sum(len(each.sequences) for each in draws)
    short = [
        f"{each.source.name} gave {len(each.sequences)} of {each.requested} from {each.rows} rows ("
        + (", ".join(f"{count} {reason}" for reason, count in sorted(each.skipped.items())) or "no others")
        + ")"
        for each in draws
        if len(each.sequences) < each.requested
    ]
    remedy = "name larger data sets, or lower --target_traces or --min_tokens"
    return f"{had} of {asked} sequences: {'; '.join(short)}; {remedy}"
