"""The training loop of neural predictors: streamed shards, a memory budget, and a resume that is exact to the bit.

An effective batch is planned (training.epoch), read ahead in a thread, and worked through in micro-batches while
gradients add up: memory depends on the micro-batch, never on run or batch. Where memory runs out all the same, the
micro-batch is halved and the step is done again from its start. The learning rate warms up, then follows a cosine of
the progress towards whichever limit ends first: epochs, steps or minutes. Randomness is drawn from (seed, step, first
piece of the micro-batch), so a checkpoint needs no generator state. Resumed runs are equal where epochs or steps end
them; a clock can not be repeated.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundwork.ahead import ReadAhead
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.interrupt import finishing_steps
from groundwork.progress import Progress as Bar
from groundwork.progress import log, progress
from speculation.counted import RoutingCounts, count_routing
from speculation.features import RoutingBatch
from speculation.neural import NeuralPredictor, saved_precision
from speculation.predictor import OPTIONAL_COLUMNS, RoutingShape
from speculation.training.distributed import ALONE, Group
from speculation.training.epoch import Epoch, MicroBatch, Step
from speculation.training.memory import (
    enforce_budget,
    forget_cached,
    is_out_of_memory,
    micro_batch_tokens,
    packed_bytes_per_token,
    peaks_gb,
)
from speculation.training.optimizer import MuonAdamW
from speculation.training.precision import uses_bfloat16
from speculation.training.schedule import LoopSettings, rate
from speculation.training.state import Progress, Weights
from speculation.training.validation import tokens_between, validation_recall
from speculation.training.view import TrainingView

__all__ = ["READ_AHEAD", "LoopSettings", "Training", "fit_module"]

READ_AHEAD = 4  # micro-batches
RECORDED_STEPS = 20  # steps between two lines of the record

Record = Callable[[dict[str, Any]], None]


def fit_module(
    predictor: NeuralPredictor,
    dataset: TrainingView,
    settings: LoopSettings,
    *,
    split: str = "train",
    counts: RoutingCounts | None = None,
    checkpoint: Path | None = None,
    record: Record | None = None,
    group: Group = ALONE,
) -> Progress:
    """Trains a predictor's module, on from `checkpoint` where that file exists, and keeps the best weights.

    `record` is given one dict for every 20 steps and every validation. Under torchrun, `group` is this process's place;
    the first process alone writes the checkpoint and records. A signal ends training after its step with a checkpoint
    and KeyboardInterrupt. Raises ConfigurationError for an empty split, a budget too small for one token, or a
    checkpoint of other settings; ExpertSpeculationError when the loss is no longer a number or a single token does not
    fit into memory.
    """
    training = Training(predictor, dataset, settings, split, counts, checkpoint, record, group)
    enforce_budget(predictor.device, settings.memory_budget_gb)
    try:
        with training.group.joined(predictor.device):
            training.run()
    finally:
        enforce_budget(predictor.device, None)
    return training.state


class _OutOfMemory(Exception):
    """Some process ran out of memory in this step."""


class Training:
    """One training: where it stands and how a step is taken; `fit_module` is what runs it."""

    def __init__(
        self,
        predictor: NeuralPredictor,
        dataset: TrainingView,
        settings: LoopSettings,
        split: str = "train",
        counts: RoutingCounts | None = None,
        checkpoint: Path | None = None,
        record: Record | None = None,
        group: Group = ALONE,
    ) -> None:
        self.predictor, self.dataset, self.settings, self.split = predictor, dataset, settings, split
        self.checkpoint, self.group, self.device = checkpoint, group, predictor.device
        self.record = record if group.leads else None
        self.first_epoch = Epoch(dataset, split, predictor.longest_piece, settings.seed)
        if len(self.first_epoch) == 0:
            raise ConfigurationError(f"the traces hold no sequence of split {split} to train on; collect more")
        predictor.shape_ = shape = RoutingShape.of(dataset)
        predictor.uses = predictor.uses & dataset.available
        counts = counts if counts is not None else count_routing(dataset, split)
        module = predictor.build(shape, torch.Generator().manual_seed(settings.seed), counts).to(self.device)
        predictor.module_ = module
        self.bfloat16 = uses_bfloat16(self.device, settings.precision)
        average = None
        if settings.ema is not None:
            average = {name: each.detach().clone() for name, each in module.named_parameters()}
        optimizer = MuonAdamW(module, predictor.muon_parameters(module), settings.learning_rate)
        self.weights = Weights(module, optimizer, average, {})
        self.columns = (
            frozenset(predictor.sees(dataset.available)) | (predictor.learns_from & dataset.available)
        ) & OPTIONAL_COLUMNS
        self.state = Progress()
        self.clock: Callable[[], float] = time.monotonic
        self.step_done: Callable[[], None] = lambda: None
        if checkpoint is not None and checkpoint.exists():
            self.state = self.weights.load(checkpoint, self._identity())
        limit = micro_batch_tokens(
            self.device,
            settings.memory_budget_gb,
            sum(parameter.numel() for parameter in module.parameters()),
            predictor.training_bytes_per_token(shape),
            (READ_AHEAD + 2) * packed_bytes_per_token(dataset.spec, self.columns),
        )
        self.state.micro_batch_tokens = min(self.state.micro_batch_tokens or limit, limit)
        self.epoch_tokens = self.first_epoch.tokens
        self.validation_tokens = tokens_between(dataset, self.epoch_tokens)

    def run(self) -> None:
        """Trains until a limit is reached, and leaves the best weights in the module."""
        started = time.monotonic() - self.state.seconds
        self.clock = lambda: time.monotonic() - started
        # All processes plan alike, so by the one with least memory.
        self.state.micro_batch_tokens = self.group.smallest(self.state.micro_batch_tokens, self.device)
        self.saved = time.monotonic()
        epochs = self.settings.epoch_limit
        total = None if epochs is None else epochs * self.epoch_tokens
        bar: Bar[None] = progress(
            total=total, description=f"training {self.predictor.name}", unit="tokens", done=self.state.tokens
        )
        with bar, finishing_steps() as step_done:
            while not self._finished():
                try:
                    self.step_done = step_done
                    self._epoch(bar)
                except _OutOfMemory:
                    forget_cached(self.device)
        if not self.weights.best:  # resumed after its time was up, before the first validation
            self._validate(bar)
        module = self.weights.module
        module.load_state_dict(saved_precision(self.weights.best))
        module.eval()

    def _epoch(self, bar: Bar[None]) -> None:
        """Goes on to the end of the epoch or of the training; raises _OutOfMemory where the plan has to change."""
        state, epoch = self.state, self.first_epoch
        if state.epoch > 0:
            seed = _seed(self.settings.seed, "epoch", state.epoch)
            epoch = Epoch(self.dataset, self.split, self.predictor.longest_piece, seed)
        plan = (self.settings.batching(), state.piece, state.micro_batch_tokens, self.group.size)
        own = (each for step in epoch.steps(*plan) for each in self.own(step))
        with ReadAhead(epoch.read(own, self.columns), READ_AHEAD) as batches:
            for step in epoch.steps(*plan):
                interrupted = self.step(step, batches)
                state.piece = step.next_piece
                if state.piece == len(epoch):
                    state.epoch, state.piece = state.epoch + 1, 0
                bar.update(step.tokens)
                finished = self._finished()
                if finished or self._validation_due(step.tokens):
                    self._validate(bar)
                    finished = self._finished()
                if interrupted or (time.monotonic() - self.saved >= self.settings.checkpoint_seconds) or finished:
                    self._save()
                if interrupted:
                    raise KeyboardInterrupt
                if finished:
                    return

    def own(self, step: Step) -> list[MicroBatch]:
        """This process's part of a step."""
        return step.micro_batches[self.group.rank :: self.group.size]

    def step(self, step: Step, batches: Iterator[RoutingBatch]) -> bool:
        """One optimizer step with the next batches; returns whether a signal has come to any process.

        Raises _OutOfMemory, with the micro-batch halved, where the step has to be planned and done again.
        """
        state, module = self.state, self.weights.module
        own = self.own(step)
        module.train()
        loss = torch.zeros((), device=self.device)
        failed = False
        try:
            for micro_batch, batch in zip(own, islice(batches, len(own)), strict=True):
                loss += self._backward(micro_batch, batch, step.tokens)
            value = float(loss)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed, value = True, 0.0
        clock = self.clock() if self.group.leads else 0.0  # one clock for all
        extra = (value, failed, _signalled(self.step_done), clock)
        value, failures, signals, seconds = self.group.sum_gradients(module, extra)
        if failures:
            self.weights.optimizer.zero_grad()
            self._halve(step)
            raise _OutOfMemory
        if not math.isfinite(value):
            raise ExpertSpeculationError(f"the training loss is {value} at step {state.step}; lower the learning rate")
        self.weights.optimizer.step(rate(state.step, self._share_done()))
        self.weights.optimizer.zero_grad()
        self.weights.follow(self.settings.ema or 0.0, state.step)
        state.step += 1
        state.tokens += step.tokens
        state.seconds = seconds
        state.loss_sum += value * step.tokens
        state.loss_tokens += step.tokens
        if self.record is not None and state.step % RECORDED_STEPS == 0:
            self.record({**self._where(), "loss": value})
        return bool(signals)

    def _backward(self, micro_batch: MicroBatch, batch: RoutingBatch, step_tokens: int) -> Tensor:
        """Adds a micro-batch's share to the gradients; returns its share of the loss."""
        seed, step = self.settings.seed, self.state.step
        horizon = self.predictor.sample_horizon(torch.Generator().manual_seed(_seed(seed, "horizon", step)))
        noise = torch.Generator(self.device).manual_seed(_seed(seed, "noise", step, micro_batch.number))
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            logits_TLE = self.predictor.logits(batch, horizon, noise)
        loss = self.predictor.loss(logits_TLE.float(), batch) * (batch.num_tokens / step_tokens)
        loss.backward()
        return loss.detach()

    def _halve(self, step: Step) -> None:
        """Halves the micro-batch for good; all processes come to the same size, as all know the step."""
        if step.largest == 1:
            raise ExpertSpeculationError(
                f"step {self.state.step}: out of memory with a single token; make the predictor smaller or free memory"
            )
        self.state.micro_batch_tokens = step.largest // 2
        log(
            f"step {self.state.step}: out of memory with {step.largest} tokens at once; "
            f"doing it again with at most {self.state.micro_batch_tokens}"
        )

    def _validate(self, bar: Bar[None]) -> None:
        """Scores validation_stop, and keeps the weights where none were better."""
        state = self.state
        self.weights.swap_average()
        recall = validation_recall(self.predictor, self.dataset, self.columns, self.group)
        if recall is None or recall > state.best_recall:
            state.best_recall, state.best_step, state.stale = (-1.0 if recall is None else recall), state.step, 0
            self.weights.keep_best()
        else:
            state.stale += 1
        self.weights.swap_average()
        loss = state.loss_sum / max(state.loss_tokens, 1)
        state.loss_sum, state.loss_tokens = 0.0, 0
        bar.set_postfix(loss=loss, validation_recall=recall if recall is not None else "none")
        if self.record is not None:
            self.record({**self._where(), "loss": loss, "validation_recall": recall, **peaks_gb(self.device)})

    def _validation_due(self, step_tokens: int) -> bool:
        tokens, every = self.state.tokens, self.validation_tokens
        return tokens // every > (tokens - step_tokens) // every

    def _share_done(self) -> float:
        return self.settings.share_done(self.state, self.epoch_tokens)

    def _finished(self) -> bool:
        return self._share_done() >= 1 or self.state.stale >= self.settings.patience

    def _where(self) -> dict[str, Any]:
        state = self.state
        return {
            "step": state.step,
            "epoch": round(state.tokens / self.epoch_tokens, 3),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "learning_rate": self.settings.learning_rate * rate(state.step, self._share_done()),
        }

    def _save(self) -> None:
        if self.checkpoint is not None and self.group.leads:
            self.weights.save(self.checkpoint, self.state, self._identity())
        self.saved = time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued; limits may change, a longer run is a use of resuming."""
        changeable = {"epochs", "max_steps", "max_minutes", "memory_budget_gb", "checkpoint_seconds"}
        pieces = self.first_epoch.pieces
        return {
            "predictor": self.predictor.name,
            **{f"option {name}": value for name, value in self.predictor.options().items()},
            "plan_fingerprint": self.dataset.spec.plan_fingerprint,
            "training_pieces": hashlib.blake2b(pieces.tobytes(), digest_size=8).hexdigest(),
            "split": self.split,
            **self.dataset.limits,
            **{name: value for name, value in asdict(self.settings).items() if name not in changeable},
        }


def _signalled(step_done: Callable[[], None]) -> bool:
    """Whether a signal has come since the last step; all processes then end after the same one."""
    try:
        step_done()
    except KeyboardInterrupt:
        return True
    return False


def _seed(*parts: int | str) -> int:
    """A seed of its own for each purpose and step."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
