"""Files as other tools write them, imports of them, and the comparison of two runs."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.interchange.importing import ImportResult, import_traces
from traces.interchange.settings import ImportSettings
from traces.reader import TraceDataset

EXPERTS = 16


def _routing(tokens: int, layers: int, top_k: int, seed: int = 0) -> np.ndarray:
    """Return distinct random ids below EXPERTS, [T, L, K]; no layer is all 0."""
    ids = np.random.default_rng(seed).random((tokens, layers, EXPERTS)).argsort(-1)[..., :top_k]
    return np.where(top_k == 1, np.maximum(ids, 1), ids)


@pytest.fixture(scope="session")
def routing() -> Callable[..., np.ndarray]:
    """Return a function that makes sound expert ids."""
    return _routing


@pytest.fixture(scope="session")
def packed() -> Callable[..., str]:
    """Return a function that spells an array as base64 text."""
    return lambda array, dtype="<i4": base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


@pytest.fixture(scope="session")
def save_lines() -> Callable[..., Path]:
    """Return a function that writes JSON lines; a line may be given as bytes."""

    def save(path: Path, lines: list[Any]) -> Path:
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return path

    return save


@pytest.fixture
def run_import(tmp_path) -> Callable[..., ImportResult]:
    """Return a function that imports files into `tmp_path / "run"` with 16 experts, or with other settings."""

    def run(record_format: str, *paths: Path, **changes: Any) -> ImportResult:
        settings = {"output_dir": tmp_path / "run", "num_experts": EXPERTS, "model_name": "m"} | changes
        return import_traces(paths, ImportSettings(format=record_format, **settings))

    return run


@pytest.fixture(scope="session")
def load_all() -> Callable[..., list]:
    """Return a function that reads all sequences of a run with every column an import can fill."""
    return lambda run_dir: list(TraceDataset(run_dir).sequences("all", ("weights", "tokens")))


@pytest.fixture(scope="session")
def assert_equal() -> Callable[..., None]:
    """Return a function that compares two lists of sequences, all columns."""

    def compare(found: list, wanted: list) -> None:
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert (a.dataset, a.sequence_key, list(a.tokens_T)) == (b.dataset, b.sequence_key, list(b.tokens_T))
            for name in ("token_ids_T", "phase_T", "expert_ids_TLK", "routing_weights_TLK"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name, strict=True)

    return compare


@pytest.fixture(scope="session")
def only_reason() -> Callable[..., str]:
    """Return a function that gives the one reason and place of a result that left out one record."""

    def reason(result: ImportResult) -> str:
        assert result.dropped.total == 1
        ((name, found),) = result.dropped.facts().items()
        return f"{name}: {found['places'][0]}"

    return reason
