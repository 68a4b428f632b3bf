"""The record of a training: train.jsonl always, and on request an experiment tracker beside it."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groundwork import atomic
from groundwork.errors import ConfigurationError

RECORD_FILE = "train.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PROJECT = "expert-speculation"

Log = Callable[[dict[str, float], int], None]
Tracker = tuple[Log, Callable[[], None]]  # logs figures of a step; ends the run


def check_tracker(name: str | None) -> None:
    """Raises ConfigurationError for an unknown tracker, or one that is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise ConfigurationError(f"--track {name}: unknown; choose one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ConfigurationError(f"--track {name}: not installed; run 'python -m pip install {name}'")


class TrainingRecord:
    """Call it with one line of figures after another; `close` ends the tracker's run.

    A killed training may have recorded steps past its checkpoint; a resumed one drops them when it records the first.
    Raises ConfigurationError for a tracker that is unknown, not installed, or without the login it needs.
    """

    def __init__(self, folder: Path, track: str | None, config: Mapping[str, Any]) -> None:
        check_tracker(track)
        self._path = folder / RECORD_FILE
        self._started = False
        self._tracker = None if track is None else TRACKERS[track](folder, dict(config))

    def __call__(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        if not self._started:
            kept = [each for each in read_record(self._path) if each["step"] < line["step"]]
            atomic.write_text(self._path, "".join(f"{json.dumps(each)}\n" for each in kept))
            self._started = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._tracker is not None:
            figures = {
                name: value for name, value in line.items() if name != "step"
            }  # every tracker has one of its own
            numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
            self._tracker[0](numbers, line["step"])

    def close(self) -> None:
        """Ends the tracker's run."""
        if self._tracker is not None:
            self._tracker[1]()


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines of a train.jsonl; a torn last one, as a killed process may leave it, is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _tensorboard(folder: Path, config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER))
    writer.add_text("settings", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _trackio(folder: Path, config: dict[str, Any]) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(project=PROJECT, name=folder.name, config=config, resume="allow")
    return (lambda numbers, step: trackio.log(numbers, step=step)), trackio.finish


def _wandb(folder: Path, config: dict[str, Any]) -> Tracker:
    wandb = importlib.import_module("wandb")
    try:
        run = wandb.init(project=PROJECT, name=folder.name, config=config)
    except wandb.errors.UsageError as error:
        raise ConfigurationError(
            f"--track wandb: {str(error).rstrip('.')}; run 'wandb login', or set WANDB_MODE=offline to keep it here"
        ) from error
    return (lambda numbers, step: run.log(numbers, step=step)), run.finish


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "trackio": _trackio,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
