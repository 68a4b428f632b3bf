"""`train`: from a trace folder to a predictor folder, which is complete when its config is there.

The folder is flat: config.json, model.safetensors, the counts of the baselines, a model card and the training log;
beside them a checkpoint while training has not ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device, describe_device, peak_memory_bytes
from groundwork.progress import log
from groundwork.provenance import library_versions
from speculation.card import CARD_FILE, model_card
from speculation.counted import BASELINES_FILE, CountedPredictor, count_routing
from speculation.loop import LoopSettings, fit_module
from speculation.neural import NeuralPredictor
from speculation.predictor import CONFIG_FILE, MODEL_FILE, Predictor, RoutingShape, create
from traces.reader import TraceDataset

CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "training_log.jsonl"
OWN_FILES = frozenset({CHECKPOINT_FILE, LOG_FILE, BASELINES_FILE, CARD_FILE, CONFIG_FILE, MODEL_FILE})


@dataclass(frozen=True)
class TrainSettings:
    """One training run; None leaves the choice to the predictor's own defaults. `options` size the predictor."""

    shard_dir: Path
    predictor: str = "interlayer"
    output_dir: Path | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    device: str = "auto"
    memory_budget_gb: float = 24.0
    epochs: int | None = None
    max_minutes: float | None = None
    max_steps: int | None = None
    seed: int = 0
    resume: bool = False
    hold_out_dataset: tuple[str, ...] = ()
    checkpoint_seconds: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def loop(self) -> LoopSettings:
        """What the training loop needs of it; raises ConfigurationError on values out of range."""
        names = ("gradient_accumulation_steps", "epochs", "max_minutes", "max_steps", "memory_budget_gb", "seed")
        values = {name: getattr(self, name) for name in (*names, "checkpoint_seconds")}
        return LoopSettings(**values, **({} if self.batch_size is None else {"batch_size": self.batch_size}))


def train(settings: TrainSettings) -> Path:
    """Fits a predictor on the train split and writes its folder, `models/<run>-<predictor>` unless told otherwise.

    Raises ConfigurationError for an unknown predictor or data set, a missing required column, an empty train split, an
    output folder that holds something else or a finished predictor, and a checkpoint of other settings.
    """
    loop = settings.loop()
    predictor = create(settings.predictor, **settings.options)
    dataset = TraceDataset(settings.shard_dir)
    predictor.check_columns(dataset, str(settings.shard_dir))
    windows = dataset.order("train", hold_out=settings.hold_out_dataset)
    if not windows:
        raise ConfigurationError(
            f"{settings.shard_dir}: none of its {dataset.num_sequences} sequences is in the train split; collect more"
        )
    device = choose_device(settings.device)
    folder = settings.output_dir or Path("models") / f"{_run_name(settings.shard_dir)}-{predictor.name}"
    if _claim(folder, settings.resume):
        log(f"{folder}: training has finished before; nothing to do")
        return folder

    started = time.monotonic()
    shape = RoutingShape.of(dataset)
    counts = count_routing(dataset, "train", settings.hold_out_dataset)
    counts.save(folder / BASELINES_FILE)
    training, index = np.concatenate(windows), dataset.index
    provenance: dict[str, Any] = {
        "traced_model": dataset.spec.model_name,
        "traced_quantization": dataset.spec.quantization,
        "plan_fingerprint": dataset.spec.plan_fingerprint,
        "train_sequences": len(training),
        "train_tokens": int(index.num_tokens_S[training].sum()),
        "datasets": sorted(index.datasets[code] for code in np.unique(index.dataset_S[training])),
        "hold_out_dataset": sorted(settings.hold_out_dataset),
        "columns": predictor.sees(dataset.available),
        "library_versions": library_versions(),
    }
    if isinstance(predictor, NeuralPredictor):
        provenance |= _fit_neural(predictor.to(device), dataset, settings, loop, folder, counts)
    elif isinstance(predictor, CountedPredictor):
        predictor.fit_counts(counts, shape)
    else:
        predictor.fit(dataset, hold_out=settings.hold_out_dataset)
    provenance["seconds"] = round(provenance.get("seconds", time.monotonic() - started), 1)
    provenance["peak_memory_gb"] = round(peak_memory_bytes(device) / 1e9, 2)
    log(f"trained {predictor.name} in {provenance['seconds']:.0f} s, peak memory {provenance['peak_memory_gb']:.2f} GB")
    _finish(predictor, folder, provenance)
    return folder


def _fit_neural(
    predictor: NeuralPredictor,
    dataset: TraceDataset,
    settings: TrainSettings,
    loop: LoopSettings,
    folder: Path,
    counts: Any,
) -> dict[str, Any]:
    """Runs the loop with checkpoint and log; returns what the model card says of it."""
    if predictor.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(predictor.device)
    path = folder / LOG_FILE
    if not (folder / CHECKPOINT_FILE).exists():
        path.unlink(missing_ok=True)

    def record(line: dict[str, Any]) -> None:
        # A killed run may have logged past its checkpoint; those steps are done again.
        earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [each for each in earlier if json.loads(each)["step"] < line["step"]]
        atomic.write_text(path, "".join(f"{each}\n" for each in [*kept, json.dumps(line)]))

    state = fit_module(
        predictor,
        dataset,
        loop,
        hold_out=settings.hold_out_dataset,
        counts=counts,
        checkpoint=folder / CHECKPOINT_FILE,
        record=record,
    )
    assert predictor.module_ is not None
    return {
        "columns": predictor.sees(dataset.available),
        "settings": asdict(loop),
        "device": describe_device(predictor.device),
        "parameters": sum(parameter.numel() for parameter in predictor.module_.parameters()),
        "steps": state.step,
        "trained_tokens": state.tokens,
        "seconds": state.seconds,
        "validation_recall": None if state.best_recall < 0 else round(state.best_recall, 4),
        "validation_step": state.best_step,
    }


def _claim(folder: Path, resume: bool) -> bool:
    """Makes the output folder ours; True when it already holds a finished predictor that `--resume` accepts."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(
            f"{folder}: a file, wanted a folder to write the predictor to; choose another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in folder.iterdir()}
    foreign = sorted(present - OWN_FILES)
    if foreign:
        raise ConfigurationError(
            f"{folder}: holds {foreign[0]}, which is no part of a predictor; choose another --output_dir"
        )
    if CONFIG_FILE in present:
        if resume:
            return True
        raise ConfigurationError(f"{folder}: already holds a predictor; choose another --output_dir or remove it")
    if present and not resume:
        raise ConfigurationError(f"{folder}: holds an unfinished training; continue it with --resume or remove it")
    return False


def _finish(predictor: Predictor, folder: Path, provenance: dict[str, Any]) -> None:
    """Writes card and predictor, the config last, then drops the checkpoint."""
    predictor.provenance_ = provenance
    atomic.write_text(folder / CARD_FILE, model_card(predictor, folder.name))
    predictor.save_pretrained(folder)
    predictor.folder_ = folder
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def _run_name(shard_dir: Path) -> str:
    path = Path(shard_dir).resolve()
    return path.parent.name if path.name == "data" else path.name
