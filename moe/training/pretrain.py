"""Train a mini-Mixtral from text files: tokenizer, model, validation, checkpoints, exact resume.

Resuming is exact because every step is a function of the checkpoint alone: the order of the data comes from the seed
and the epoch, the model has no dropout, and float32 master weights and both optimizers' states are kept.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from groundwork.checkpoint import load_checkpoint, refuse_other_settings, save_checkpoint
from groundwork.errors import ConfigurationError, IncompleteError
from groundwork.hardware import choose_device, describe_device
from groundwork.progress import Progress, log, progress
from groundwork.provenance import library_versions
from moe.mini import MiniSize, mixtral_config, size
from moe.source import find_source, quiet, refusing
from moe.training import corpus as corpus_files
from moe.training.corpus import Corpus, fingerprint, read_corpus, token_stream, training_rows
from moe.training.loss import BALANCE_WEIGHT, document_losses, training_losses
from moe.training.optimizer import MixtralOptimizer
from moe.training.tokenizer import train_tokenizer

CHECKPOINT_FILE = "checkpoint.safetensors"
GRADIENT_NORM = 1.0
VALIDATION_DOCUMENTS = 24
"""Held-out documents per source that are scored during training; the closing score uses all of them."""


@dataclass(frozen=True)
class PretrainSettings:
    """What a training run does.

    `steps` and `batch_size` (sequences) default to the preset's; `micro_batch` sequences go through the model at once;
    `init_from` starts from a trained model of the same size instead of random weights, with its tokenizer. A text file
    that is named twice counts twice. `checkpoint_minutes` and `validate_steps` say how often; after `stop_after` steps
    of this call training stops with a checkpoint, for jobs with a time limit.
    """

    size: str
    text: tuple[Path, ...]
    output_dir: Path
    steps: int | None = None
    batch_size: int | None = None
    micro_batch: int = 16
    learning_rate: float | None = None
    balance_weight: float = BALANCE_WEIGHT
    init_from: Path | None = None
    device: str = "auto"
    seed: int = 0
    resume: bool = False
    checkpoint_minutes: float = 5.0
    validate_steps: int = 200
    stop_after: int | None = None

    def resolved(self) -> tuple[MiniSize, int, int, float]:
        """The preset, and the steps, batch size and learning rate that hold after defaults."""
        shape = size(self.size)
        rate = self.learning_rate or shape.learning_rate
        return shape, self.steps or shape.steps, self.batch_size or shape.batch_size, rate


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Train, and write a checkpoint in transformers' layout: bf16 safetensors, config, tokenizer, `training.json`.

    Returns the content of `training.json`: settings, figures over the run, held-out loss by source in nats per token.

    Raises:
        ConfigurationError: unusable text, an output folder with other content, or a resume that does not fit.
        IncompleteError: `stop_after` was reached.
    """
    shape, steps, batch_size, learning_rate = settings.resolved()
    resumed = _is_resumed(settings)
    device = choose_device(settings.device)
    corpus = read_corpus(list(settings.text))
    log(f"text: {corpus.characters / 1e6:.1f} M characters in {len(corpus.train)} sources")
    tokenizer = _tokenizer(settings, corpus, shape)
    documents = token_stream([text for texts in corpus.train.values() for text in texts], tokenizer)
    tokens = sum(map(len, documents))
    if tokens <= shape.sequence_length:
        raise ConfigurationError(
            f"--text: {tokens} tokens are fewer than one row of {shape.sequence_length} for --size {settings.size}; "
            "give more text"
        )
    held_out = {name: token_stream(texts, tokenizer) for name, texts in corpus.held_out.items()}
    seen = steps * batch_size * shape.sequence_length
    log(f"tokens: {tokens / 1e6:.2f} M for training, {seen / 1e6:.1f} M will be seen")

    torch.manual_seed(settings.seed)
    model = _model(settings, shape)
    model.to(device)
    optimizer = MixtralOptimizer(model, learning_rate, steps)
    run = _Run(settings, shape, steps, batch_size, model, optimizer, tokenizer, fingerprint(documents))
    if resumed:
        run.restore()
    run.train(documents, held_out)
    return run.finish(corpus, held_out, tokens)


class _Run:
    """The state of one training: model, optimizers, steps done, seconds spent."""

    def __init__(
        self,
        settings: PretrainSettings,
        shape: MiniSize,
        steps: int,
        batch_size: int,
        model: MixtralForCausalLM,
        optimizer: MixtralOptimizer,
        tokenizer: PreTrainedTokenizerFast,
        text_fingerprint: str,
    ) -> None:
        self.settings, self.shape, self.model, self.optimizer = settings, shape, model, optimizer
        self.tokenizer, self.batch_size, self.steps = tokenizer, batch_size, steps
        self.done, self.seconds = 0, 0.0
        self.checkpoint = settings.output_dir / CHECKPOINT_FILE
        self.identity = {
            "size": settings.size,
            "steps": steps,
            "batch_size": batch_size,
            "micro_batch": settings.micro_batch,
            "learning_rate": optimizer.learning_rate,
            "balance_weight": settings.balance_weight,
            "init_from": None if settings.init_from is None else settings.init_from.name,
            "seed": settings.seed,
            "text": text_fingerprint,
        }

    def restore(self) -> None:
        tensors, facts = load_checkpoint(self.checkpoint)
        refuse_other_settings(self.checkpoint, facts["identity"], self.identity)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        self.optimizer.load_state_tensors(
            {name: value for name, value in tensors.items() if not name.startswith("model.")}
        )
        self.done, self.seconds = facts["steps_done"], facts["seconds"]
        log(f"resumed after step {self.done} of {self.steps}")

    def save(self) -> None:
        model = {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        facts = {"identity": self.identity, "steps_done": self.done, "seconds": self.seconds}
        save_checkpoint(self.checkpoint, {**model, **self.optimizer.state_tensors()}, facts)

    def train(self, documents: list[Any], held_out: dict[str, list[Any]]) -> None:
        epoch, rows = -1, np.empty((0, self.shape.sequence_length + 1), dtype=np.int32)
        rows_per_epoch = (sum(map(len, documents)) - 1) // self.shape.sequence_length
        saved = time.monotonic()
        last = self.steps if self.settings.stop_after is None else self.done + self.settings.stop_after
        bar: Progress[None] = progress(total=self.steps, description="pretrain", unit="step", done=self.done)
        with bar:
            while self.done < self.steps:
                started = time.monotonic()
                batch = []
                for number in range(self.done * self.batch_size, (self.done + 1) * self.batch_size):
                    if number // rows_per_epoch != epoch:
                        epoch = number // rows_per_epoch
                        rows = training_rows(documents, self.shape.sequence_length, self.settings.seed, epoch)
                    batch.append(rows[number % rows_per_epoch])
                loss = self._step(torch.from_numpy(np.stack(batch)).long().to(self.model.device))
                self.done += 1
                self.seconds += time.monotonic() - started
                bar.update(1)
                bar.set_postfix(loss=f"{loss:.3f}")
                self._note({"step": self.done, "loss": round(loss, 4), "seconds": round(self.seconds, 1)})
                if self.done % self.settings.validate_steps == 0 and self.done < self.steps:
                    losses = self.losses_by_source(held_out, VALIDATION_DOCUMENTS)
                    mean = sum(losses.values()) / max(1, len(losses))
                    self._note({"step": self.done, "held_out": losses, "held_out_mean": mean})
                    log(f"step {self.done}: held-out loss {mean:.3f} nats per token, mean over sources")
                if time.monotonic() - saved > 60 * self.settings.checkpoint_minutes or self.done == self.steps:
                    self.save()
                    saved = time.monotonic()
                if self.done == last < self.steps:
                    self.save()
                    raise IncompleteError(
                        f"{self.settings.output_dir}: stopped after step {self.done} of {self.steps}, "
                        "as --stop_after asked; continue with --resume"
                    )

    def _step(self, rows: Tensor) -> float:
        self.model.train()
        parts = rows.split(self.settings.micro_batch)
        language = 0.0
        for part in parts:
            share = len(part) / len(rows)
            with torch.autocast(rows.device.type, dtype=torch.bfloat16):
                losses = training_losses(self.model, part, self.settings.balance_weight)
            (losses.total * share).backward()
            language += losses.language.item() * share
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        if not torch.isfinite(norm):
            raise ValueError(f"step {self.done + 1}: gradient norm is {norm.item()}; lower --learning_rate")
        self.optimizer.step(self.done)
        self.model.zero_grad(set_to_none=True)
        return language

    def losses_by_source(self, held_out: dict[str, list[Any]], documents: int | None) -> dict[str, float]:
        """Nats per predicted token on the first `documents` held-out documents of each source, cut to one row."""
        self.model.eval()
        result = {}
        for name, arrays in sorted(held_out.items()):
            rows = [row[: self.shape.sequence_length + 1] for row in arrays[:documents] if len(row) > 1]
            total, count = 0.0, 0
            for start in range(0, len(rows), self.settings.micro_batch):
                part = [torch.from_numpy(row).long() for row in rows[start : start + self.settings.micro_batch]]
                lengths = torch.tensor([len(row) for row in part])
                padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(self.model.device)
                with torch.autocast(self.model.device.type, dtype=torch.bfloat16):
                    total += document_losses(self.model, padded, lengths).sum().item()
                count += int(lengths.sum()) - len(part)
            result[name] = total / max(1, count)
        return result

    def finish(self, corpus: Corpus, held_out: dict[str, list[Any]], tokens: int) -> dict[str, Any]:
        output = self.settings.output_dir
        losses = self.losses_by_source(held_out, None)
        half: Any = self.model
        with quiet():
            half.to(torch.bfloat16).save_pretrained(output)
        self.tokenizer.save_pretrained(output)
        record = {
            "settings": {
                **asdict(self.settings),
                "text": [path.name for path in self.settings.text],
                "init_from": self.identity["init_from"],
                "output_dir": output.name,
            },
            "identity": self.identity,
            "device": describe_device(self.model.device),
            "seconds": round(self.seconds, 1),
            "training_tokens": tokens,
            "tokens_seen": self.steps * self.batch_size * self.shape.sequence_length,
            "sources": {
                name: {"documents": len(texts), "characters": sum(map(len, texts))}
                for name, texts in sorted(corpus.train.items())
            },
            "held_out_share": corpus_files.HELD_OUT_SHARE,
            "held_out_loss": losses,
            "library_versions": library_versions(),
        }
        (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        self.checkpoint.unlink(missing_ok=True)
        return record

    def _note(self, facts: dict[str, Any]) -> None:
        with (self.settings.output_dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")


def _is_resumed(settings: PretrainSettings) -> bool:
    """Make the output folder; say whether a checkpoint in it is to be continued."""
    output = settings.output_dir
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"--output_dir {output}: is a file; name a folder")
    output.mkdir(parents=True, exist_ok=True)
    if not any(output.iterdir()):
        return False
    if not settings.resume:
        raise ConfigurationError(
            f"--output_dir {output}: holds files already; continue with --resume or name another folder"
        )
    unfinished = (output / CHECKPOINT_FILE).exists()
    if not unfinished and (output / "training.json").exists():
        raise ConfigurationError(f"--output_dir {output}: this training is finished; name another folder for a new one")
    return unfinished


def _model(settings: PretrainSettings, shape: MiniSize) -> Any:
    """A randomly initialised model, or the trained one that `--init_from` names."""
    if settings.init_from is None:
        return MixtralForCausalLM(mixtral_config(shape))
    source = find_source(str(settings.init_from), weights=True)
    with refusing(source, "language model"):
        model = MixtralForCausalLM.from_pretrained(source.folder, dtype=torch.float32, use_safetensors=True)
    wanted = mixtral_config(shape)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts"):
        found = getattr(model.config, name)
        if found != getattr(wanted, name):
            raise ConfigurationError(
                f"--init_from {settings.init_from}: has {name} {found}, but --size {settings.size} has "
                f"{getattr(wanted, name)}; give a model of that size"
            )
    return model


def _tokenizer(settings: PretrainSettings, corpus: Corpus, shape: MiniSize) -> PreTrainedTokenizerFast:
    """The tokenizer of an interrupted run or of `--init_from`, or a fresh one; saved before the first step."""
    for folder in (settings.output_dir, settings.init_from):
        if folder is not None and (folder / "tokenizer.json").exists():
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer.save_pretrained(settings.output_dir)
            return tokenizer
    texts = (text for source in corpus.train.values() for text in source)
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    tokenizer.save_pretrained(settings.output_dir)
    return tokenizer
