import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import create, evaluate, load_predictor
from speculation.loop import LoopSettings, fit_module
from speculation.neural import NeuralPredictor
from speculation.trainer import TrainSettings, train
from traces.reader import TraceDataset

SMALL = {"hidden_size": 16, "num_heads": 2, "mlp_size": 16}


def settings(run_dir: Path, folder: Path, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "max_steps": 10,
        "options": SMALL,
        "device": "cpu",
        "checkpoint_seconds": 0.0,
        "batch_size": 8,
    }
    return TrainSettings(run_dir, "interlayer", folder, **{**values, **changes})


def test_interlayer_beats_the_baselines_on_routing_that_needs_both_layers_and_tokens(
    run_dir: Path, tmp_path: Path
) -> None:
    folder = train(TrainSettings(run_dir, "interlayer", tmp_path / "p", epochs=8, device="cpu"))
    result = evaluate(TraceDataset(run_dir), {"interlayer": load_predictor(folder)}, bootstrap=200)
    low = {each["b"]: each["low"] for each in result["differences"]}
    assert min(low[name] for name in ("frequency", "repeat", "markov")) > 0.05
    assert result["predictors"]["interlayer"]["sees"] == ["ids", "weights"]


def test_the_folder_holds_a_predictor_with_counts_card_and_log_and_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    folder = train(settings(run_dir, tmp_path / "p", hold_out_dataset=("code",)))
    names = {"config.json", "model.safetensors", "baselines.safetensors", "README.md", "training_log.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    made = load_predictor(folder).provenance_
    assert made["datasets"] == ["prose"]
    assert made["steps"] == 10
    assert made["library_versions"]["torch"] == torch.__version__
    *_, line = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "tokens", "seconds", "loss", "validation_recall", "learning_rate"} == set(line)
    card = (folder / "README.md").read_text()
    assert "`synthetic`" in card
    assert "4 layers, top 2 of 8 experts" in card


KILLED_CHILD = """
import os, signal, sys
from pathlib import Path
from speculation import register
from speculation.interlayer import InterLayer
from speculation.trainer import TrainSettings, train

@register
class Mortal(InterLayer):
    losses = 0
    def loss(self, logits, ids):
        Mortal.losses += 1
        if Mortal.losses == {fatal}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(logits, ids)

Mortal.name = InterLayer.name
train(TrainSettings(Path({run!r}), "interlayer", Path({folder!r}), max_steps=20, batch_size=8, device="cpu",
                    checkpoint_seconds=0.0, options={options!r}))
"""


def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(run_dir: Path, tmp_path: Path) -> None:
    whole = train(settings(run_dir, tmp_path / "whole", max_steps=20))
    killed = tmp_path / "killed"
    code = KILLED_CHILD.format(fatal=13, run=str(run_dir), folder=str(killed), options=SMALL)
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (killed / "checkpoint.safetensors").exists()
    with pytest.raises(ConfigurationError, match="unfinished training; continue it with --resume"):
        train(settings(run_dir, killed, max_steps=20))
    with pytest.raises(ConfigurationError, match=r"other settings .seed was 0, now 1"):
        train(settings(run_dir, killed, max_steps=20, seed=1, resume=True))
    resumed = train(settings(run_dir, killed, max_steps=20, resume=True))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    logs = [(folder / "training_log.jsonl").read_text().splitlines() for folder in (whole, resumed)]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]
    assert train(settings(run_dir, killed, max_steps=20, resume=True)) == killed


def test_the_memory_budget_bounds_the_slice_and_leaves_the_step_as_it_is(dataset: TraceDataset) -> None:
    options = {**SMALL, "dropout": 0.0, "weight_dropout": 0.0}
    weights = []
    for budget in (24.0, 0.0015):
        predictor = create("interlayer", **options)
        assert isinstance(predictor, NeuralPredictor)
        loop = LoopSettings(max_steps=4, memory_budget_gb=budget, weight_decay=0.0)
        state = fit_module(predictor, dataset, loop)
        weights.append((state.slice_tokens, predictor.state()["below_LXD"]))
    assert weights[1][0] < 100 < weights[0][0]
    torch.testing.assert_close(weights[0][1], weights[1][1], atol=2e-4, rtol=1e-3)
    with pytest.raises(ConfigurationError, match="--memory_budget_gb 1e-05: too little"):
        create("interlayer").fit(dataset, max_steps=1, memory_budget_gb=1e-5)


def test_accumulation_and_batch_size_make_equal_steps_of_equal_sequences(dataset: TraceDataset) -> None:
    options = {**SMALL, "dropout": 0.0, "weight_dropout": 0.0}
    learned = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        predictor = create("interlayer", **options)
        assert isinstance(predictor, NeuralPredictor)
        predictor.sample_horizon = lambda _: 1  # type: ignore[method-assign]
        loop = LoopSettings(max_steps=3, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        learned.append((fit_module(predictor, dataset, loop).tokens, predictor.state()["head_LDE"]))
    assert learned[0][0] == learned[1][0]
    torch.testing.assert_close(learned[0][1], learned[1][1], atol=2e-4, rtol=1e-3)


def test_training_stops_when_time_is_up_or_validation_no_longer_improves(dataset: TraceDataset) -> None:
    predictor = create("interlayer", **SMALL)
    assert isinstance(predictor, NeuralPredictor)
    assert fit_module(predictor, dataset, LoopSettings(max_minutes=1e-6)).step == 1
    state = fit_module(predictor, dataset, LoopSettings(epochs=50, learning_rate=1e-12, patience=2))
    assert state.epoch == 3
    assert state.best_step < state.step


def test_wrong_requests_are_refused_before_anything_is_written(run_dir: Path, make_traces: Any, tmp_path: Path) -> None:
    bare = make_traces(sequences=12, store=())
    with pytest.raises(ConfigurationError, match=r"requires the column 'lookahead'.*--store weights,lookahead"):
        train(TrainSettings(bare, "gate_lookahead", tmp_path / "p"))
    with pytest.raises(ConfigurationError, match="none of its 12 sequences is in the train split"):
        train(TrainSettings(bare, "markov", tmp_path / "p", hold_out_dataset=("prose", "code")))
    with pytest.raises(ConfigurationError, match="'news' is not in these traces; they hold prose, code"):
        train(TrainSettings(run_dir, "markov", tmp_path / "p", hold_out_dataset=("news",)))
    with pytest.raises(ConfigurationError, match="--epochs 0: must be at least 1"):
        train(settings(run_dir, tmp_path / "p", epochs=0))
    with pytest.raises(ConfigurationError, match="--device tpu"):
        train(settings(run_dir, tmp_path / "p", device="tpu"))
    assert not (tmp_path / "p").exists()


def test_an_output_folder_with_something_else_or_a_finished_predictor_is_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigurationError, match=r"holds thesis.tex, which is no part of a predictor"):
        train(TrainSettings(run_dir, "markov", tmp_path))
    folder = train(TrainSettings(run_dir, "markov", tmp_path / "m"))
    with pytest.raises(ConfigurationError, match="already holds a predictor"):
        train(TrainSettings(run_dir, "markov", folder))
