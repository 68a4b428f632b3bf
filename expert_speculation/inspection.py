"""What a path holds: a trace folder, a trained predictor or a model, each in a few facts."""

import json
from pathlib import Path
from typing import Any

from groundwork.errors import ConfigurationError


def describe(path: str) -> dict[str, Any]:
    """Return name -> value facts of the trace folder, predictor folder or model at `path`, without loading weights.

    Raises:
        ConfigurationError: it is none of these.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{path}: is a file; give a trace folder, a predictor folder or a model")
    if (folder / "data").is_dir() or any(folder.glob("*.parquet")):
        return _trace_facts(folder)
    if "predictor" in _config(folder):
        return _predictor_facts(folder)
    if not folder.exists() and path.count("/") != 1:
        raise ConfigurationError(f"{path}: no such folder; give a trace folder, a predictor folder or a model")
    from moe.description import describe_model

    return {"kind": "model", **describe_model(path)}


def _trace_facts(folder: Path) -> dict[str, Any]:
    import numpy as np

    from traces.reader import TraceDataset

    dataset = TraceDataset(folder)
    spec = dataset.spec
    counts = np.bincount(dataset.index.dataset_S, minlength=len(dataset.datasets))
    sequences = sorted(zip(dataset.datasets, counts, strict=True))
    return {
        "kind": "trace folder",
        "model": spec.model_name,
        "precision": f"{spec.model_dtype}, quantization {spec.quantization}, router {spec.router_dtype}",
        "MoE layers (L)": spec.num_layers,
        "experts (E)": spec.num_experts,
        "per token (K)": spec.top_k,
        "columns": ", ".join(sorted(dataset.available)),
        "shards": len(dataset.shard_paths),
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "data sets": ", ".join(f"{name} {count}" for name, count in sequences),
    }


def _predictor_facts(folder: Path) -> dict[str, Any]:
    config = _config(folder)
    return {"kind": "predictor", **{key: value for key, value in config.items() if not isinstance(value, dict | list)}}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
