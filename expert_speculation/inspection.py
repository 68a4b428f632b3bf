"""What a path holds: a trace folder, a trained predictor or a model, each in a few facts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundwork.errors import ConfigurationError

if TYPE_CHECKING:
    from traces.schema import TraceSpec


def describe(path: str) -> dict[str, Any]:
    """Return name -> value facts of the trace folder, predictor folder or model at `path`, without loading weights.

    Raises:
        ConfigurationError: it is none of these.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{path}: is a file; give a trace folder, a predictor folder or a model")
    if _holds_traces(folder):
        return _trace_facts(folder)
    if "predictor" in _config(folder):
        return _predictor_facts(folder)
    if not folder.exists() and path.count("/") != 1:
        raise ConfigurationError(f"{path}: no such folder; give a trace folder, a predictor folder or a model")
    from moe.description import describe_model

    return {"kind": "model", **describe_model(path)}


def _holds_traces(folder: Path) -> bool:
    """Say whether a run writes there, however young it is, or shards lie there."""
    run_dir = folder.parent if folder.name == "data" else folder
    begun = (run_dir / "plan.json").exists() or (run_dir / ".lock").exists()
    return begun or (folder / "data").is_dir() or any(folder.glob("*.parquet"))


def _trace_facts(folder: Path) -> dict[str, Any]:
    import numpy as np

    from traces.reader import TraceDataset
    from traces.shards import NothingFinishedError

    try:
        dataset = TraceDataset(folder)
    except NothingFinishedError as error:
        return _planned_facts(error.run_dir)
    counts = np.bincount(dataset.index.dataset_S, minlength=len(dataset.datasets))
    return {
        **_spec_facts(dataset.spec),
        "columns": ", ".join(sorted(dataset.available)),
        "shards": len(dataset.shard_paths),
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "data sets": _spoken_counts(dict(zip(dataset.datasets, counts.tolist(), strict=True))),
    }


def _planned_facts(run_dir: Path) -> dict[str, Any]:
    """Return what the plan tells of a run that has no finished shard."""
    from traces.plan import Plan

    plan = Plan.load(run_dir)
    planned = plan.sequences["dataset"].value_counts().to_pylist()
    return {
        **_spec_facts(plan.spec),
        "columns": ", ".join(sorted({"ids", *plan.spec.store})),
        "shards": 0,
        "planned shards": len(plan.shards),
        "planned sequences": plan.sequences.num_rows,
        "planned tokens": sum(shard.num_tokens for shard in plan.shards),
        "data sets": _spoken_counts({each["values"]: each["counts"] for each in planned}),
        "state": "no shard is finished yet; an interrupted run goes on with --resume",
    }


def _spec_facts(spec: "TraceSpec") -> dict[str, Any]:
    return {
        "kind": "trace folder",
        "model": spec.model_name,
        "precision": f"{spec.model_dtype}, quantization {spec.quantization}, router {spec.router_dtype}",
        "MoE layers (L)": spec.num_layers,
        "experts (E)": spec.num_experts,
        "per token (K)": spec.top_k,
    }


def _spoken_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _predictor_facts(folder: Path) -> dict[str, Any]:
    config = _config(folder)
    return {"kind": "predictor", **{key: value for key, value in config.items() if not isinstance(value, dict | list)}}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
