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
    assert "step" not in events.Tags()["scalars"]


def test_trackio_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    record = TrainingRecord(tmp_path, "trackio", {"seed": 0})
    record({"step": 20, "loss": 1.5, "validation_recall": None})
    record.close()
    (line,) = SQLiteStorage.get_logs("expert-speculation", tmp_path.name)
    assert (line["step"], line["loss"]) == (20, 1.5)
    assert "validation_recall" not in line


def test_wandb_keeps_an_offline_run_and_without_login_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = TrainingRecord(tmp_path, "wandb", {"seed": 0})
    record({"step": 20, "loss": 1.5, "validation_recall": None})
    record.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 0
    assert "loss 1.5" in capfd.readouterr().err  # its own summary of the run
    wandb.teardown()  # else it keeps to the mode it started in
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigurationError, match=r"--track wandb: .*; run 'wandb login', or set WANDB_MODE=offline"):
        TrainingRecord(tmp_path, "wandb", {"seed": 0})
