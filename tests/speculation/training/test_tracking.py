import importlib.util
from pathlib import Path

import pytest

from groundwork.errors import ConfigurationError
from speculation.training.tracking import TRACKERS, TrainingRecord, check_tracker, read_record


def test_a_resumed_record_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    record = TrainingRecord(tmp_path, None, {})
    for step in (20, 40, 60):
        record({"step": step, "loss": 1.0})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"step": 80, "lo')
    resumed = TrainingRecord(tmp_path, None, {})
    resumed({"step": 40, "loss": 2.0})
    resumed({"step": 40, "loss": 2.0, "validation_recall": 0.5})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_record(tmp_path / "train.jsonl")] == [
        (20, 1.0),
        (40, 2.0),
        (40, 2.0),
    ]


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--track mlflow: unknown; choose one of trackio, tensorboard, wandb"):
        check_tracker("mlflow")
    check_tracker(None)


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigurationError, match=f"--track {name}: not installed; run 'python -m pip install {name}'"):
        check_tracker(name)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = TrainingRecord(tmp_path, "tensorboard", {"seed": 0})
    record({"step": 20, "loss": 1.5, "validation_recall": None})
    record.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (20, 1.5)
    assert "validation_recall" not in events.Tags()["scalars"]
