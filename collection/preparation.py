"""All that is known of a run before weights are read: whatever can be refused is refused here, cheapest first."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from collection.batching import preset_batch_tokens
from collection.datasets import Source, keep_revisions, resolve
from collection.devices import check_devices, join_devices, split_devices
from collection.forecast import choose_execution, foresee, possible_executions
from collection.plan import Layout, lay_out, texts_digests
from collection.sampling import Draw, draw
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError, IncompleteError
from groundwork.hardware import choose_devices
from groundwork.progress import log
from groundwork.provenance import library_versions
from moe.description import DTYPES, describe_model
from moe.foresight import SHARE_FOR_WEIGHTS, Loading, TooLargeError
from moe.load import load_tokenizer
from moe.quantize import MODES
from moe.source import find_source
from traces.plan import PLAN_NAME, Plan
from traces.run_folder import check_folder, refuse_changes
from traces.schema import TraceSpec


@dataclass(frozen=True)
class Prepared:
    """Settings that fit model and machine, the drawn texts and the order of work.

    `spec` is what the traces will say, as far as the model's configuration tells; `identity` is the part of the plan's
    settings that does not depend on the weights. `devices` are those of each process, the settings' the first one's.
    """

    settings: CollectSettings
    model: dict[str, Any]
    loading: Loading
    run_dir: Path
    draws: list[Draw]
    spec: TraceSpec
    layout: Layout
    identity: dict[str, Any]
    devices: list[str]


def prepare(settings: CollectSettings) -> Prepared:
    """Check the settings, draw the texts and lay out the work; raises ConfigurationError for what can not work.

    A run to be resumed is compared with its saved plan, and what was left to the program stays as it was decided then.
    Raises IncompleteError where there is no usable text at all.
    """
    if settings.output_dir is not None:
        check_folder(settings.output_dir, resume=settings.resume)
    devices = split_devices(settings.device)
    check_devices(settings, devices)
    sources = resolve(settings.datasets, settings.dataset_root)
    model = describe_model(settings.model, settings.dtype)
    run_dir = settings.run_dir(model["name"])
    check_folder(run_dir, resume=settings.resume)
    saved = Plan.load(run_dir) if settings.resume and (run_dir / PLAN_NAME).exists() else None
    _say_what_has_no_effect(settings, run_dir, saved)
    if saved:
        settings = _keep_decisions(settings, saved)
        keep_revisions(sources, saved.sources)
    devices = join_devices(settings, devices)
    on = choose_devices(devices[0])
    if settings.horizons >= model["num_layers"]:
        raise ConfigurationError(
            f"--lookahead {settings.horizons}: must be below the {model['num_layers']} MoE layers of {model['name']}; "
            "lower it"
        )
    settings = replace(
        _limit_length(settings, model),
        device="+".join(map(str, on)),
        batch_tokens=None if settings.batch_size == "auto" else settings.batch_tokens or preset_batch_tokens(*on),
    )
    identity = _identity(settings, model, on[0], sources)
    if saved:
        refuse_changes(run_dir, saved, identity | _asked_for(settings, model))
    settings, loading = _settle_execution(settings)
    if saved and settings.engine != "ray":  # there the workers' GPUs decide
        refuse_changes(run_dir, saved, {"quantization": loading.mode})
    identity["execution"] = settings.execution
    draws = draw(sources, load_tokenizer(settings.model), settings)
    if not any(each.sequences for each in draws):
        raise IncompleteError(f"{run_dir}: nothing was written, for there are {shortfall(draws)}")
    spec = _foretell(settings, model, loading.mode)
    layout = lay_out(draws, spec, settings)
    identity["texts"] = texts_digests(layout.sequences)
    if saved:
        _refuse_other_texts(run_dir, saved, identity["texts"])
    return Prepared(settings, model, loading, run_dir, draws, spec, layout, identity, devices)


def shortfall(draws: list[Draw]) -> str | None:
    """Say how many sequences there are of those asked for, and where missing ones went; None where there are all."""
    asked, had = sum(each.requested for each in draws), sum(len(each.sequences) for each in draws)
    short = [
        f"{each.source.name} gave {len(each.sequences)} of {each.requested} from {each.rows} rows ("
        + (", ".join(f"{count} {reason}" for reason, count in sorted(each.skipped.items())) or "no others")
        + ")"
        for each in draws
        if len(each.sequences) < each.requested
    ]
    if not short:
        return None
    remedy = f"name larger data sets, or lower {'--target_traces or ' if had else ''}--min_tokens"
    return f"{had} of {asked} sequences: {'; '.join(short)}; {remedy}"


def _say_what_has_no_effect(settings: CollectSettings, run_dir: Path, saved: Plan | None) -> None:
    if settings.resume and saved is None:
        log(f"{run_dir}: holds no run to continue, so --resume starts one")
    if settings.temperature != CollectSettings.temperature and not settings.generate:
        log(f"--temperature {settings.temperature:g} has no effect without --generate")
    if settings.lookahead_norm != CollectSettings.lookahead_norm and not settings.horizons:
        log(f"--lookahead_norm {settings.lookahead_norm} has no effect without --lookahead")
    if settings.execution == "resident":
        for name in ("pass_tokens", "memory_budget_gb"):
            if getattr(settings, name) != getattr(CollectSettings, name):
                log(f"--{name} {getattr(settings, name):g} has no effect without --execution streamed")


def _settle_execution(settings: CollectSettings) -> tuple[CollectSettings, Loading]:
    """Return the settings with their execution chosen, and how the model is loaded in it.

    Raises TooLargeError, which names streaming where that is the way out.
    """
    try:
        if settings.execution != "auto":
            return settings, foresee(settings, settings.execution)
        possible = possible_executions(settings)
        execution = choose_execution(possible)
    except TooLargeError as error:
        remedy = _streaming_remedy(settings)
        raise TooLargeError(f"{error}{remedy}", error.loading) from error
    if execution == "streamed":
        whole = possible["resident"].loading
        kept = f", {SHARE_FOR_WEIGHTS:.0%} of them for weights" if whole.needed <= whole.free else ""
        log(
            f"--execution auto: the model takes {whole.needed / 1e9:.1f} GB, and {whole.free / 1e9:.1f} GB are free on "
            f"{' and '.join(map(str, whole.devices))}{kept}, so it is streamed, one layer at a time"
        )
    return replace(settings, execution=execution), possible[execution].loading


def _streaming_remedy(settings: CollectSettings) -> str:
    """Return the words that add streaming to a sentence's remedies; none where it is not possible either."""
    try:
        loading = foresee(settings, "streamed")
    except ConfigurationError:  # not even two layers fit, or the files are not there
        return ""
    option, without = settings.unstreamable, ""
    if option is not None:
        without = " with devices joined by commas" if option.startswith("--device") else f" without {option}"
    return f", or --execution streamed{without}, which takes {loading.needed / 1e9:.1f} GB"


def _refuse_other_texts(run_dir: Path, saved: Plan, digests: dict[str, str]) -> None:
    """Raise ConfigurationError, naming the sources, where the drawn texts are not those of the saved plan."""
    before = saved.settings.get("texts")
    if before != digests:
        known = before if isinstance(before, dict) else {}
        changed = [name for name in sorted(known | digests) if known.get(name) != digests.get(name)]
        raise ConfigurationError(
            f"{run_dir}: --resume continues a run with unchanged settings only, and the texts of {', '.join(changed)}, "
            "or the tokens that they become, changed since it was planned; restore them or choose another --output_dir"
        )


def _keep_decisions(settings: CollectSettings, saved: Plan) -> CollectSettings:
    """Return the settings with each `auto` as the saved plan has it, whatever is free or installed today.

    Left to be decided anew, and compared later: which of the GPUs, and what no option can ask for (the precision of a
    checkpoint that is quantised already, the experts of one that is quantised on loading).
    """
    auto = {
        "execution": ("auto", ("resident", "streamed")),
        "quantization": ("auto", MODES),
        "dtype": ("auto", DTYPES),
        "device": ("auto", ("cpu", "mps")),
        "batch_size": ("auto", None),
        "batch_tokens": (None, None),
        "attn_implementation": (None, None),
        "experts_implementation": (None, None),
    }
    decided: dict[str, Any] = {
        name: saved.settings.get(name)
        for name, (undecided, choices) in auto.items()
        if getattr(settings, name) == undecided and (choices is None or saved.settings.get(name) in choices)
    }
    if saved.settings.get("quantization") != "none":
        decided.pop("experts_implementation", None)
    return replace(settings, **decided)


def _limit_length(settings: CollectSettings, model: dict[str, Any]) -> CollectSettings:
    """Lower `max_length` to the number of positions that the model was made for, and say so."""
    limit = getattr(_text_config(settings), "max_position_embeddings", None)
    if limit is None or settings.max_length + settings.generate <= limit:
        return settings
    if settings.generate + settings.min_tokens > limit:
        raise ConfigurationError(
            f"--generate {settings.generate}: {model['name']} reads at most {limit} tokens, which leaves no room for a "
            f"prompt of --min_tokens {settings.min_tokens}; lower it"
        )
    rest = limit - settings.generate
    log(
        f"{model['name']} reads at most {limit} tokens: --max_length {settings.max_length} is lowered to "
        + (f"{rest}, before --generate {settings.generate}" if settings.generate else "that")
    )
    return replace(settings, max_length=rest)


def _text_config(settings: CollectSettings) -> Any:
    config = AutoConfig.from_pretrained(find_source(settings.model).folder, trust_remote_code=False)
    return config.get_text_config()


def _identity(
    settings: CollectSettings, model: dict[str, Any], device: torch.device, sources: list[Source]
) -> dict[str, Any]:
    """Return what a resumed run must share of the plan's fields, as far as texts and weights are not needed for it."""
    versions = library_versions()
    return {
        "model": model["name"],
        "model_revision": model["revision"],
        "execution": settings.execution,
        "device": device.type,
        "datasets": [each.name for each in sources],
        "target_traces": settings.target_traces,
        "max_length": settings.max_length,
        "min_tokens": settings.min_tokens,
        "batch_size": settings.batch_size,
        "batch_tokens": settings.batch_tokens,
        "shard_size_mb": settings.shard_size_mb,
        "store": list(settings.columns),
        "lookahead": settings.horizons,
        "lookahead_norm": settings.lookahead_norm if settings.horizons else None,
        "sample_hidden": settings.sample_hidden or None,
        "generate": settings.generate or None,
        "temperature": settings.temperature if settings.generate else None,
        "seed": settings.seed,
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
    }


def _asked_for(settings: CollectSettings, model: dict[str, Any]) -> dict[str, Any]:
    """Return, by the plan's names, how a checkpoint that is not quantised will be loaded, where that is said outright.

    What is so refused is refused before the weights are read, which for a large model takes minutes.
    """
    if model["quantization"] != "none":
        return {}
    asked = {"quantization": settings.quantization or "none", "dtype": settings.dtype}
    return {name: value for name, value in asked.items() if value != "auto"}


def _foretell(settings: CollectSettings, model: dict[str, Any], quantization: str) -> TraceSpec:
    """Return the spec that the configuration implies; implementations are as the settings ask for them."""
    return TraceSpec(
        model_name=model["name"],
        model_revision=model["revision"],
        num_layers=model["num_layers"],
        num_experts=model["num_experts"],
        top_k=model["top_k"],
        moe_layers=tuple(model["moe_layers"]),
        expert_order="weight",
        weights_normalized=model["weights_normalized"],
        quantization=quantization,
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
        lookahead_norm=settings.lookahead_norm if settings.horizons else None,
        hidden_size=_text_config(settings).hidden_size if settings.sample_hidden else 0,
        hidden_fraction=float(settings.sample_hidden),
    )
