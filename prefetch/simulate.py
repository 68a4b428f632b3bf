"""The whole answer: a table of prefetchers and policies on one machine, what it depends on, and three sentences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from groundwork.errors import ConfigurationError
from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.model import ModelProfile
from prefetch.answers import as_json, sentences, what_else
from prefetch.contest import all_rows, alone_with, best_caching, best_of
from prefetch.guesses import perfect_guesses, predictor_guesses
from prefetch.prediction_time import prediction_us
from prefetch.rows import Row, format_rows
from prefetch.settings import SimulateSettings, experts_counted
from prefetch.simulation import Prefetcher, Simulation, usage_rates
from prefetch.sweep import sweep
from prefetch.timing import Timing
from prefetch.workload import read_workload
from speculation.counted import RoutingCounts
from speculation.evaluation import training_counts
from speculation.predictor import MAX_HORIZON, Predictor
from traces.reader import TraceDataset

FORMAT_VERSION = 1
RAM_SHARE = 0.75  # of RAM, what experts may take; the rest is the system's and the program's


def simulate(
    dataset: TraceDataset,
    predictors: Mapping[str, Predictor],
    model: ModelProfile,
    hardware: HardwareProfile,
    settings: SimulateSettings,
    only: Collection[str] = (),
) -> dict[str, Any]:
    """Simulate decoding a split with no prefetching, with each predictor, and with perfect foresight; ready for JSON.

    Raises ConfigurationError where model, predictors and traces do not fit each other, or the cache is too small.
    """
    _check(dataset, predictors, model, settings)
    notes: list[str] = []
    timing = Timing.of(model, hardware, settings.precision, min(settings.batch_size, dataset.num_sequences))
    counts = _counts(dataset, predictors, settings.split, notes)
    workload = read_workload(dataset, settings.split, only)
    if predictors and settings.split in ("train", "all"):
        notes.append(f"split {settings.split} holds sequences that a predictor given may have been trained on")
    if not workload.decoded:
        notes.append("these traces hold prompts; their tokens are simulated as if they had been decoded one by one")
    simulation = Simulation(
        workload,
        timing,
        _capacity(settings, model, hardware, timing),
        None if counts is None else usage_rates(counts.usage_LE.numpy(), workload.shape.top_k),
        settings.batch_size,
        settings.cache_layout == "pooled",
        _ram_experts(settings, model, hardware, timing),
    )

    costs_ns = {name: _cost_ns(predictor, dataset, settings) for name, predictor in predictors.items()}

    def ask(name: str, horizon: int) -> Prefetcher:
        guesses = predictor_guesses(dataset, settings.split, only, predictors[name], horizon, model.num_experts)
        return Prefetcher(guesses, horizon, settings.budget or model.top_k, settings.threshold, costs_ns[name])

    known = perfect_guesses(workload)
    prefetchers = {name: ask(name, settings.horizon) for name in predictors}
    prefetchers["perfect"] = Prefetcher(known, settings.horizon, model.top_k)
    prefetchers["oracle"] = Prefetcher(known, model.moe_layers, model.top_k)
    rows = all_rows(simulation, prefetchers, list(predictors), settings)
    caching, predicted, perfect = best_caching(rows), best_of(rows, predictors), best_of(rows, ["perfect"])
    assert perfect is not None
    recall = {name: each.guesses.recall(workload.expert_ids_TLK, each.budget) for name, each in prefetchers.items()}
    now = caching if predicted is None else predicted
    others = [] if predicted is None else [
        ask(predicted.prefetcher, horizon)
        for horizon in _other_horizons(dataset, predictors[predicted.prefetcher], settings)
    ]  # fmt: skip
    changes = what_else(
        simulation,
        now.policy,
        prefetchers.get(now.prefetcher),
        others,
        prefetchers["perfect"],
        prefetchers["oracle"],
    )
    return {
        "format_version": FORMAT_VERSION,
        "model": dataset.spec.model_name,
        "split": settings.split,
        "only_dataset": sorted(only),
        "sequences": len(workload.lengths_S),
        "tokens": int(workload.lengths_S.sum()),
        "settings": asdict(settings),
        "hardware": asdict(hardware),
        "model_profile": asdict(model),
        "machine": _machine(simulation, settings, model, timing),
        "prefetchers": {
            name: {"horizon": each.horizon, "budget": each.budget, "recall": recall[name],
                   "prediction_us": each.predict_ns / 1000}
            for name, each in prefetchers.items()
        },
        "rows": [row.figures() | {"over_caching": row.faster_than(caching)} for row in rows],
        "best_caching": caching.policy,
        "answers": sentences(simulation, caching, predicted, _evicting(rows, predicted), perfect, recall, changes),
        "what_else": as_json(changes),
        "sweep": _sweep(simulation, rows, prefetchers, list(predictors), settings) if settings.sweep_tokens else None,
        "notes": notes,
    }  # fmt: skip


def format_result(result: Mapping[str, Any]) -> str:
    """Return the result as text for a terminal: the machine, the table, the three sentences, notes."""
    machine = result["machine"]
    taking = ", ".join(
        f"{name} in {each['prediction_us']:.0f} us"
        for name, each in result["prefetchers"].items()
        if name not in ("perfect", "oracle")
    )
    ram = "" if machine["ram_experts"] is None else f", RAM {machine['ram_experts']:,}, the disk the rest"
    return "\n".join(
        [
            f"{result['model_profile']['name']}, {machine['precision']} ({machine['expert_bytes'] / 1e6:.1f} MB an "
            f"expert), on {result['hardware']['name']}: the GPU holds {machine['cache_experts']:,} of "
            f"{machine['experts']:,} experts{ram}; a transfer takes {machine['transfer_us']:.0f} us, a layer "
            f"computes {machine['layer_us']:.0f} us for a token",
            "",
            format_rows(result["rows"]),
            "",
            *result["answers"],
            f"{result['sequences']:,} sequences, {result['tokens']:,} tokens of split {result['split']}, "
            f"{result['settings']['batch_size']} at once, predictions {result['settings']['horizon']} ahead"
            f"{f' ({taking})' if taking else ''}; the last column compares with caching alone "
            f"({result['best_caching']})",
            *(f"note: {note}" for note in result["notes"]),
        ]
    )


def _check(
    dataset: TraceDataset, predictors: Mapping[str, Predictor], model: ModelProfile, settings: SimulateSettings
) -> None:
    spec = dataset.spec
    found = (spec.num_layers, spec.num_experts, spec.top_k)
    profile = (model.moe_layers, model.num_experts, model.top_k)
    if found != profile:
        raise ConfigurationError(
            f"model profile {model.name!r} has (layers, experts, top k) {profile}, but the traces of {spec.model_name} "
            f"have {found}; name the profile of their model with --model_profile"
        )
    if settings.horizon > min(MAX_HORIZON, spec.num_layers - 1):
        raise ConfigurationError(
            f"--horizon {settings.horizon}: must be 1 to {min(MAX_HORIZON, spec.num_layers - 1)} for these traces"
        )
    if settings.budget is not None and settings.budget > spec.num_experts:
        raise ConfigurationError(
            f"--budget {settings.budget}: a layer has {spec.num_experts} experts; give at most that"
        )
    if "guided" in settings.policies and not predictors:
        raise ConfigurationError("--policy guided: evicts by a predictor's scores; name one with --predictor_dir")
    for predictor in predictors.values():
        origin = str(predictor.folder_ or predictor.name)
        predictor.check_shape(dataset, origin)
        predictor.check_columns(dataset, origin)


def _counts(
    dataset: TraceDataset, predictors: Mapping[str, Predictor], split: str, notes: list[str]
) -> RoutingCounts | None:
    """Return how often experts are used in training, as far as that is known; adds to `notes` where it is less."""
    said: list[str] = []
    counts = training_counts(dataset, predictors, split, said)
    if counts is None:
        notes.append(
            "which experts are used most is not known without the sequences simulated, so the cache starts empty and "
            "policy static is left out; a predictor folder with counts would tell"
        )
    elif said:
        notes.append(
            "the cache starts with the experts used most where a predictor given was trained, not in the whole train "
            "split"
        )
    return counts


def _capacity(settings: SimulateSettings, model: ModelProfile, hardware: HardwareProfile, timing: Timing) -> int:
    everything = model.moe_layers * model.num_experts
    if settings.cache_experts is not None:
        return experts_counted("--cache_experts", settings.cache_experts, everything, timing.expert_bytes)
    room = hardware.gpu_memory_bytes - hardware.reserved_bytes - model.resident_bytes()
    if room < timing.expert_bytes:
        raise ConfigurationError(
            f"{model.name} on {hardware.name}: beside {model.resident_bytes() / 1e9:.1f} GB of other weights and "
            f"{hardware.reserved_gb:g} GB reserved there is no room for experts in {hardware.gpu_memory_gb:g} GB; "
            "choose another --hardware or a smaller model, or set --cache_experts to simulate it nevertheless"
        )
    return min(everything, room // timing.expert_bytes)


def _ram_experts(
    settings: SimulateSettings, model: ModelProfile, hardware: HardwareProfile, timing: Timing
) -> int | None:
    """Return how many experts RAM holds; None where it holds all."""
    everything = model.moe_layers * model.num_experts
    if settings.ram_experts is not None:
        held = experts_counted("--ram_experts", settings.ram_experts, everything, timing.expert_bytes)
    else:
        held = int(RAM_SHARE * hardware.ram_bytes) // timing.expert_bytes
    return None if held >= everything else held


def _cost_ns(predictor: Predictor, dataset: TraceDataset, settings: SimulateSettings) -> int:
    """Return what one prediction costs, as given, documented or measured."""
    given_ns = settings.prediction_ns()
    if given_ns is not None:
        return given_ns
    measure = settings.prediction_us == "measure"
    return round(1000 * prediction_us(predictor, dataset, settings.split, settings.horizon, measure=measure))


def _other_horizons(dataset: TraceDataset, predictor: Predictor, settings: SimulateSettings) -> list[int]:
    """Return the horizons beside the one asked for that the predictor can serve with what these traces hold."""
    farthest = min(MAX_HORIZON, dataset.spec.num_layers - 1)
    if "lookahead" in predictor.requires:
        farthest = min(farthest, dataset.spec.horizons)
    return [horizon for horizon in range(1, farthest + 1) if horizon != settings.horizon]


def _evicting(rows: list[Row], predicted: Row | None) -> Row | None:
    """Return the row that evicts as the best predictor's does and prefetches nothing, where there is one."""
    wanted = None if predicted is None else ("none", predicted.policy)
    return next((row for row in rows if (row.prefetcher, row.policy) == wanted), None)


def _machine(simulation: Simulation, settings: SimulateSettings, model: ModelProfile, timing: Timing) -> dict[str, Any]:
    """Return what the run came down to, in numbers that a reader can check."""
    shape = simulation.workload.shape
    layer_ns = timing.attention_ns_A[1] + timing.experts_ns_AE[1, shape.top_k]
    return {
        "precision": settings.precision or model.default_precision,
        "expert_bytes": timing.expert_bytes,
        "experts": shape.num_layers * shape.num_experts,
        "cache_experts": simulation.capacity,
        "cache_layout": settings.cache_layout,
        "ram_experts": simulation.ram_experts,
        "transfer_us": timing.transfer_ns / 1000,
        "disk_read_us": timing.read_ns / 1000,
        "layer_us": float(layer_ns) / 1000,
        "other_us_per_token": float(timing.other_ns_A[1]) / 1000,
        "tokens_per_s_with_all_experts": 1e9 / timing.resident_ns(shape.num_layers, shape.top_k),
    }


def _sweep(
    simulation: Simulation,
    rows: list[Row],
    prefetchers: Mapping[str, Prefetcher],
    predictors: list[str],
    settings: SimulateSettings,
) -> dict[str, Any]:
    """Sweep a part of the sequences, drawn at random, with the policy that each prefetcher does best with."""
    part, kept_T = simulation.workload.of(simulation.workload.part(settings.sweep_tokens, settings.seed))
    best = [best_caching(rows), best_of(rows, predictors), best_of(rows, ["perfect"]), best_of(rows, ["oracle"])]
    contestants: dict[str, tuple[str, Prefetcher | None]] = {}
    for row in best:
        if row is not None:
            alone = row.prefetcher == "none"
            with_it = alone_with(prefetchers, predictors, row.policy) if alone else prefetchers[row.prefetcher]
            part_of_it = None if with_it is None else replace(with_it, guesses=with_it.guesses.of(kept_T))
            contestants[row.prefetcher] = row.policy, part_of_it
    name = best[1].prefetcher if best[1] else "perfect"
    policy, graded = contestants[name]
    assert graded is not None
    like_it = policy, replace(graded, budget=simulation.workload.shape.top_k, threshold=0.0)
    return sweep(simulation.changed(workload=part), contestants, like_it, settings.seed)
