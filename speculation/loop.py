"""The training loop of neural predictors: streamed shards, a memory budget, and a resume that is exact to the bit.

A step takes `batch_size * gradient_accumulation_steps` sequences off the shuffled stream. They are packed, given
features and worked through in slices of tokens, as many as the budget allows, while gradients add up: memory depends
on the slice, never on run or batch. The learning rate warms up, then follows a cosine of the progress towards
whichever limit ends first: epochs, steps or minutes. A step's randomness is drawn from (seed, step), so a checkpoint
needs no generator state. Resumed runs are equal where epochs or steps end them; a clock can not be repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundwork.checkpoint import load_checkpoint, refuse_other_settings, save_checkpoint
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.hardware import free_memory_bytes
from groundwork.progress import Progress as Bar
from groundwork.progress import progress
from speculation.counted import RoutingCounts, count_routing
from speculation.features import RoutingBatch, multi_hot, packed_batches
from speculation.metrics import ranked_experts
from speculation.neural import NeuralPredictor
from speculation.predictor import OPTIONAL_COLUMNS, RoutingShape
from traces.reader import TraceDataset
from traces.schema import SequenceTrace

DEFAULT_EPOCHS = 20
SLICE_TOKENS = {"cpu": 512, "cuda": 16384}  # at most: on a CPU larger slices leave the cache and are slower
BUDGET_SHARE = 0.4  # of the memory budget, for the features of a batch and for a slice each; the rest is for weights
WARMUP_STEPS = 20
FINAL_RATE = 0.01  # of the learning rate, at the end

Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class LoopSettings:
    """How to train; the first limit reached of epochs, steps and minutes ends it, 20 epochs where none is set."""

    batch_size: int = 2  # sequences
    gradient_accumulation_steps: int = 1
    epochs: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    learning_rate: float = 6e-3  # after a minute of training 0.01 more recall than 3e-3, on two models' traces
    weight_decay: float = 0.05
    patience: int = 5  # validations without a better one before training ends
    memory_budget_gb: float = 24.0
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"--{name} {value}: must be at least 1")
        for name in ("max_minutes", "memory_budget_gb", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"--{name} {value}: must be above 0")


@dataclass
class Progress:
    """Where training stands; what a checkpoint holds beside tensors."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # sequences of this epoch already used
    tokens: int = 0
    seconds: float = 0.0
    best_recall: float = -1.0
    best_step: int = 0
    stale: int = 0  # validations since the best
    slice_tokens: int = 0
    packed_tokens: int = 0


def fit_module(
    predictor: NeuralPredictor,
    dataset: TraceDataset,
    settings: LoopSettings,
    *,
    split: str = "train",
    hold_out: Collection[str] = (),
    counts: RoutingCounts | None = None,
    checkpoint: Path | None = None,
    record: Record | None = None,
) -> Progress:
    """Trains a predictor's module, on from `checkpoint` where that file exists, and keeps the best weights.

    `record` is given one dict per validation. Raises ConfigurationError for an empty split, a budget too small for one
    token, or a checkpoint of other settings; ExpertSpeculationError when the loss is no longer a number.
    """
    training = sum(len(window) for window in dataset.order(split, hold_out=hold_out))
    if training == 0:
        raise ConfigurationError(f"the traces hold no sequence of split {split} to train on; collect more")
    predictor.shape_ = RoutingShape.of(dataset)
    predictor.uses = predictor.uses & dataset.available
    counts = counts if counts is not None else count_routing(dataset, split, hold_out)
    module = predictor.build(predictor.shape_, torch.Generator().manual_seed(settings.seed), counts)
    predictor.module_ = module.to(predictor.device)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    state = Progress()
    state.packed_tokens, state.slice_tokens = _token_limits(predictor, settings)
    best: dict[str, Tensor] = {}
    identity = _identity(predictor, dataset, settings, split, hold_out)
    if checkpoint is not None and checkpoint.exists():
        state, best = _load_checkpoint(checkpoint, module, optimizer, identity)

    group_size = settings.batch_size * settings.gradient_accumulation_steps
    steps_per_epoch = math.ceil(training / group_size)
    total = _total_steps(settings, steps_per_epoch)
    columns = sorted(frozenset(predictor.sees(dataset.available)) & OPTIONAL_COLUMNS)
    started = time.monotonic() - state.seconds
    saved = time.monotonic()

    def finished() -> bool:
        out_of_time = settings.max_minutes is not None and state.seconds >= 60 * settings.max_minutes
        return out_of_time or (total is not None and state.step >= total) or state.stale >= settings.patience

    def validate(loss: float) -> None:
        recall = _validation_recall(predictor, dataset, columns, hold_out)
        if recall is None or recall > state.best_recall:
            state.best_recall, state.best_step, state.stale = (-1.0 if recall is None else recall), state.step, 0
            best.update({name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()})
        else:
            state.stale += 1
        state.seconds = time.monotonic() - started
        bar.set_postfix(loss=loss, validation_recall=recall if recall is not None else "none")
        line = {"step": state.step, "epoch": state.epoch, "tokens": state.tokens, "seconds": round(state.seconds, 1)}
        if record is not None:
            rate = optimizer.param_groups[0]["lr"]
            record({**line, "loss": loss, "validation_recall": recall, "learning_rate": rate})

    bar: Bar[None] = progress(total=total, description=f"training {predictor.name}", unit="steps", done=state.step)
    with bar:
        while not finished():
            seed = settings.seed * 1_000_003 + state.epoch
            stream = dataset.sequences(split, columns, hold_out=hold_out, shuffle_seed=seed, start=state.position)
            losses: list[float] = []
            for group in _groups(stream, group_size):
                share = _share_done(state, settings, total)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = settings.learning_rate * _rate(state.step, share)
                losses.append(_step(predictor, dataset, group, settings, state, optimizer))
                state.step += 1
                state.position += len(group)
                state.seconds = time.monotonic() - started
                bar.update()
                if finished():
                    break
                if checkpoint is not None and time.monotonic() - saved >= settings.checkpoint_seconds:
                    _save_checkpoint(checkpoint, module, optimizer, state, best, identity)
                    saved = time.monotonic()
            if state.position >= training:
                state.epoch, state.position = state.epoch + 1, 0
            validate(sum(losses) / max(len(losses), 1))
            if checkpoint is not None:
                _save_checkpoint(checkpoint, module, optimizer, state, best, identity)
                saved = time.monotonic()
        if not best:  # resumed after its time was up, before the first validation
            validate(0.0)
    module.load_state_dict(best)
    module.eval()
    return state


def _step(
    predictor: NeuralPredictor,
    dataset: TraceDataset,
    group: list[SequenceTrace],
    settings: LoopSettings,
    state: Progress,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One optimizer step over a group of sequences; returns its mean loss per token."""
    assert predictor.module_ is not None
    predictor.module_.train()
    device = predictor.device
    seed = (settings.seed << 32) + state.step
    noise, choices = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    tokens = sum(sequence.num_tokens for sequence in group)
    loss_sum = torch.zeros((), device=device)
    for start in range(0, len(group), settings.batch_size):
        horizon = predictor.sample_horizon(choices)
        part = group[start : start + settings.batch_size]
        for _, batch in packed_batches(part, dataset.spec, state.packed_tokens):
            on_device = batch.to(device)
            features = predictor.features(on_device)
            for first in range(0, batch.num_tokens, state.slice_tokens):
                window = slice(first, first + state.slice_tokens)
                ids_TLK = on_device.expert_ids_TLK[window]
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
                    logits_TLE = predictor.logits(tuple(each[window] for each in features), horizon, noise)
                loss = predictor.loss(logits_TLE, ids_TLK) * (len(ids_TLK) / tokens)
                loss.backward()
                loss_sum += loss.detach()
    value = float(loss_sum)
    if not math.isfinite(value):
        raise ExpertSpeculationError(f"the training loss is {value} at step {state.step}; lower the learning rate")
    torch.nn.utils.clip_grad_norm_(predictor.module_.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.tokens += tokens
    return value


def _validation_recall(
    predictor: NeuralPredictor, dataset: TraceDataset, columns: list[str], hold_out: Collection[str]
) -> float | None:
    """Recall at K one layer ahead on validation_stop, layers with one below; None where no sequence is in it."""
    found = wanted = 0.0
    stream = dataset.sequences("validation_stop", columns, hold_out=hold_out)
    for _, batch in packed_batches(stream, dataset.spec, 4096):
        hits_TL = _hits(predictor.predict_scores(batch), batch)
        above_TL = hits_TL[:, 1:] if batch.num_layers > 1 else hits_TL
        found += float(above_TL.sum())
        wanted += above_TL.numel() * batch.expert_ids_TLK.shape[2]
    return found / wanted if wanted else None


def _hits(scores_TLE: Tensor, batch: RoutingBatch) -> Tensor:
    """How many of the router's K are among the K best scores, (T, L)."""
    top_TLK = ranked_experts(scores_TLE)[:, :, : batch.expert_ids_TLK.shape[2]]
    return multi_hot(batch.expert_ids_TLK, batch.num_experts).gather(2, top_TLK).sum(dim=2)


def _groups(stream: Iterator[SequenceTrace], size: int) -> Iterator[list[SequenceTrace]]:
    while group := list(islice(stream, size)):
        yield group


def _total_steps(settings: LoopSettings, steps_per_epoch: int) -> int | None:
    """The steps that epochs and max_steps allow; None where only the clock ends training."""
    unlimited = settings.epochs is None and settings.max_steps is None and settings.max_minutes is None
    epochs = DEFAULT_EPOCHS if unlimited else settings.epochs
    limits = [epochs * steps_per_epoch if epochs is not None else None, settings.max_steps]
    return min((limit for limit in limits if limit is not None), default=None)


def _share_done(state: Progress, settings: LoopSettings, total: int | None) -> float:
    by_steps = 0.0 if total is None else state.step / total
    by_time = 0.0 if settings.max_minutes is None else state.seconds / (60 * settings.max_minutes)
    return min(1.0, max(by_steps, by_time))


def _rate(step: int, share: float) -> float:
    """The learning rate's factor: linear warm-up, then a cosine of the share done."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2)


def _token_limits(predictor: NeuralPredictor, settings: LoopSettings) -> tuple[int, int]:
    """Tokens packed together and tokens worked on at once, so that both stay within the budget."""
    assert predictor.shape_ is not None
    assert predictor.module_ is not None
    # 4 bytes each for weight, gradient and two moments.
    weights = 16 * sum(parameter.numel() for parameter in predictor.module_.parameters())
    budget = min(settings.memory_budget_gb * 1e9, free_memory_bytes(predictor.device))
    features, working = predictor.training_bytes_per_token(predictor.shape_)
    packed, piece = (int(BUDGET_SHARE * (budget - weights) / size) for size in (features, working))
    if min(packed, piece) < 1:
        raise ConfigurationError(
            f"--memory_budget_gb {settings.memory_budget_gb:g}: too little for the {weights / 1e9:.3g} GB of weights "
            f"and optimizer and {(features + working) / 1e6:.3g} MB a token; raise it or make the predictor smaller"
        )
    return packed, min(piece, SLICE_TOKENS.get(predictor.device.type, SLICE_TOKENS["cuda"]))


def _identity(
    predictor: NeuralPredictor, dataset: TraceDataset, settings: LoopSettings, split: str, hold_out: Collection[str]
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued; limits may change, a longer run is a use of resuming."""
    changeable = {"epochs", "max_steps", "max_minutes", "memory_budget_gb", "checkpoint_seconds"}
    return {
        "predictor": predictor.name,
        "options": predictor.options(),
        "plan_fingerprint": dataset.spec.plan_fingerprint,
        "num_sequences": dataset.num_sequences,
        "split": split,
        "hold_out_dataset": sorted(hold_out),
        **{name: value for name, value in asdict(settings).items() if name not in changeable},
    }


def _save_checkpoint(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Progress,
    best: dict[str, Tensor],
    identity: dict[str, Any],
) -> None:
    """Writes one safetensors file, all of it in place or none: weights, best weights, moments, and progress as JSON."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    save_checkpoint(path, tensors, {"progress": asdict(state), "identity": identity})


def _load_checkpoint(
    path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[Progress, dict[str, Tensor]]:
    """Restores module and optimizer; returns progress and best weights.

    Raises ConfigurationError when the file is damaged or of other settings.
    """
    tensors, facts = load_checkpoint(path)
    refuse_other_settings(path, facts["identity"], identity)
    module.load_state_dict(_under(tensors, "module."))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return Progress(**facts["progress"]), _under(tensors, "best.")


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
