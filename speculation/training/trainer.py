"""`train`: from a trace folder to a predictor folder, which is complete when its config is there.

The folder is flat: config.json, model.safetensors, the counts of the baselines, a model card and the training record;
beside them a checkpoint while training has not ended. Under torchrun the first process alone writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.hardware import describe_device
from groundwork.progress import log
from groundwork.provenance import library_versions
from speculation.counted import BASELINES_FILE, CountedPredictor, RoutingCounts, count_routing
from speculation.neural import NeuralPredictor
from speculation.predictor import CONFIG_FILE, MODEL_FILE, Predictor, RoutingShape, create
from speculation.training.calibrate import calibrate
from speculation.training.card import CARD_FILE, model_card
from speculation.training.distributed import Group
from speculation.training.loop import LoopSettings, fit_module
from speculation.training.memory import peaks_gb
from speculation.training.options import check_options
from speculation.training.precision import uses_bfloat16
from speculation.training.tracking import RECORD_FILE, TENSORBOARD_FOLDER, TrainingRecord, check_tracker
from speculation.training.view import TrainingView
from traces.reader import TraceDataset

CHECKPOINT_FILE = "checkpoint.safetensors"
UNFINISHED_FILES = frozenset({CHECKPOINT_FILE, RECORD_FILE, TENSORBOARD_FOLDER, BASELINES_FILE, CARD_FILE, MODEL_FILE})


@dataclass(frozen=True)
class TrainSettings:
    """One training run; None leaves the choice to the training loop. `options` size the predictor.

    `tokens` has a predictor with that option use token ids; `member` are the predictor folders of an ensemble.
    """

    shard_dir: Path
    predictor: str = "interlayer"
    output_dir: Path | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    gradient_accumulation_steps: int = 1
    device: str = "auto"
    precision: str = "auto"
    memory_budget_gb: float = 24.0
    epochs: int | None = None
    max_minutes: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    ema: float | None = None
    seed: int = 0
    resume: bool = False
    hold_out_dataset: tuple[str, ...] = ()
    only_dataset: tuple[str, ...] = ()
    train_tokens: int | None = None
    track: str | None = None
    checkpoint_seconds: float = 60.0
    tokens: bool = False
    member: tuple[Path, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def loop(self) -> LoopSettings:
        """What the training loop needs of it; raises ConfigurationError on values out of range."""
        names = {each.name for each in fields(LoopSettings)} & {each.name for each in fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        return LoopSettings(**{name: value for name, value in values.items() if value is not None})

    def create(self) -> Predictor:
        """The predictor, unfitted; raises ConfigurationError on an unknown name or option."""
        options = {**self.options, **({"tokens": True} if self.tokens else {})}
        if self.member:
            options["members"] = [str(folder) for folder in self.member]
        check_options(self.predictor, options)
        return create(self.predictor, **options)


def train(settings: TrainSettings) -> Path:
    """Fits a predictor on the train split and writes its folder, `models/<run>-<predictor>` unless told otherwise.

    Raises ConfigurationError for an unknown predictor, option, tracker or data set, a missing required column, an empty
    train split, an output folder that holds something else or a finished predictor, and a checkpoint of other settings.
    """
    group = Group.of_environment()
    with group.one_voice():
        return _train(settings, group)


def _train(settings: TrainSettings, group: Group) -> Path:
    loop = settings.loop()
    predictor = settings.create()
    check_tracker(settings.track)
    whole = TraceDataset(settings.shard_dir)
    predictor.check_columns(whole, str(settings.shard_dir))
    dataset = TrainingView(
        whole,
        hold_out=settings.hold_out_dataset,
        only=settings.only_dataset,
        train_tokens=settings.train_tokens,
        seed=settings.seed,
    )
    if not dataset.order("train"):
        raise ConfigurationError(
            f"{settings.shard_dir}: none of its {dataset.num_sequences} sequences is in the train split; collect more"
        )
    device = group.device(settings.device)
    uses_bfloat16(device, settings.precision)
    folder = settings.output_dir or Path("models") / f"{_run_name(settings.shard_dir)}-{predictor.name}"
    if settings.resume and (folder / CONFIG_FILE).exists():
        log(f"{folder}: training has finished before; nothing to do")
        return folder
    if not group.leads and not isinstance(predictor, NeuralPredictor):
        return folder
    if group.leads:
        _claim(folder, settings.resume)

    started = time.monotonic()
    counts = count_routing(dataset, "train")
    if group.leads:
        counts.save(folder / BASELINES_FILE)
    provenance = _provenance(dataset)
    if isinstance(predictor, NeuralPredictor):
        provenance |= _fit_neural(predictor.to(device), dataset, settings, loop, folder, counts, group)
    elif isinstance(predictor, CountedPredictor):
        predictor.fit_counts(counts, RoutingShape.of(dataset))
    else:
        predictor.fit(dataset)
    if not group.leads:
        return folder
    calibrate(predictor, dataset)
    provenance["columns"] = predictor.sees(dataset.available)
    provenance["seconds"] = round(provenance.get("seconds", time.monotonic() - started), 1)
    peaks = peaks_gb(device)
    named = {"peak_host_memory_gb": "host", "peak_device_memory_gb": "device"}
    shown = ", ".join(f"{value:.2f} GB on the {named[name]}" for name, value in peaks.items())
    log(f"trained {predictor.name} in {provenance['seconds']:.0f} s, peak memory {shown}")
    _finish(predictor, folder, {**provenance, **peaks, "memory_budget_gb": settings.memory_budget_gb})
    return folder


def _provenance(dataset: TrainingView) -> dict[str, Any]:
    """From what a predictor is made: the traced model, and the sequences that may be learned from."""
    training, index = np.concatenate(dataset.order("train")), dataset.index
    return {
        "traced_model": dataset.spec.model_name,
        "traced_quantization": dataset.spec.quantization,
        "plan_fingerprint": dataset.spec.plan_fingerprint,
        "train_sequences": len(training),
        "train_tokens": int(index.num_tokens_S[training].sum()),
        "datasets": sorted(index.datasets[code] for code in np.unique(index.dataset_S[training])),
        "hold_out_dataset": dataset.limits["hold_out_dataset"],
        "only_dataset": dataset.limits["only_dataset"],
        "train_tokens_limit": dataset.limits["train_tokens"],
        "library_versions": library_versions(),
    }


def _fit_neural(
    predictor: NeuralPredictor,
    dataset: TrainingView,
    settings: TrainSettings,
    loop: LoopSettings,
    folder: Path,
    counts: RoutingCounts,
    group: Group,
) -> dict[str, Any]:
    """Runs the loop with checkpoint and record; returns what the model card says of it."""
    if predictor.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(predictor.device)
    checkpoint = folder / CHECKPOINT_FILE
    record = None
    if group.leads:
        if not checkpoint.exists():
            (folder / RECORD_FILE).unlink(missing_ok=True)
        config = {"predictor": predictor.name, "options": predictor.options(), **asdict(loop), **_provenance(dataset)}
        record = TrainingRecord(folder, settings.track, config)
    try:
        state = fit_module(predictor, dataset, loop, counts=counts, checkpoint=checkpoint, record=record, group=group)
    finally:
        if record is not None:
            record.close()
    assert predictor.module_ is not None
    return {
        "settings": asdict(loop),
        "device": describe_device(predictor.device),
        "processes": group.size,
        "precision": "bfloat16" if uses_bfloat16(predictor.device, loop.precision) else "float32",
        "micro_batch_tokens": state.micro_batch_tokens,
        "parameters": sum(parameter.numel() for parameter in predictor.module_.parameters()),
        "steps": state.step,
        "trained_tokens": state.tokens,
        "seconds": state.seconds,
        "validation_recall": None if state.best_recall < 0 else round(state.best_recall, 4),
        "validation_step": state.best_step,
    }


def _claim(folder: Path, resume: bool) -> None:
    """Makes the output folder ours."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(
            f"{folder}: a file, wanted a folder to write the predictor to; choose another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in folder.iterdir()}
    if CONFIG_FILE in present:
        raise ConfigurationError(f"{folder}: already holds a predictor; choose another --output_dir or remove it")
    foreign = sorted(present - UNFINISHED_FILES)
    if foreign:
        raise ConfigurationError(
            f"{folder}: holds {foreign[0]}, which is no part of a predictor; choose another --output_dir"
        )
    if present and not resume:
        raise ConfigurationError(f"{folder}: holds an unfinished training; continue it with --resume or remove it")


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
