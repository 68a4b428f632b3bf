import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from groundwork.checkpoint import load_checkpoint
from groundwork.errors import ConfigurationError
from speculation import evaluate, load_predictor
from speculation.training.options import parse_options
from speculation.training.tracking import read_record
from speculation.training.trainer import TrainSettings, train
from traces.reader import TraceDataset

SMALL = {"hidden_size": 16, "mlp_size": 16, "context_size": 16, "context_heads": 2, "copy_heads": 2, "copy_key_size": 8}


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
    names = {"config.json", "model.safetensors", "baselines.safetensors", "README.md", "train.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    made = load_predictor(folder).provenance_
    assert made["datasets"] == ["prose"]
    assert made["steps"] == 10
    assert made["library_versions"]["torch"] == torch.__version__
    *_, line = read_record(folder / "train.jsonl")
    assert {"step", "epoch", "tokens", "seconds", "loss", "learning_rate", "peak_host_memory_gb"} < set(line)
    assert line["validation_recall"] == pytest.approx(made["validation_recall"], abs=1e-4)
    card = (folder / "README.md").read_text()
    assert "`synthetic`" in card
    assert "4 layers, top 2 of 8 experts" in card


MORTAL_CHILD = """
import os, signal, sys
from expert_speculation.command import main
from speculation.interlayer.predictor import InterLayer

loss, calls = InterLayer.loss, []

def mortal(self, logits, batch):
    calls.append(batch)
    if len(calls) == 13:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, logits, batch)

InterLayer.loss = mortal
main(sys.argv[1:])
"""


def run_python(arguments: list[str], returncode: int = 0) -> str:
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert child.returncode == returncode, child.stderr
    return child.stderr


def test_a_training_ended_by_a_signal_finishes_its_step_and_goes_on_to_the_same_predictor(
    run_dir: Path, tmp_path: Path
) -> None:
    whole = train(settings(run_dir, tmp_path / "whole", max_steps=20))
    stopped = tmp_path / "stopped"
    options = [f"--option={name}={value}" for name, value in SMALL.items()]
    options += ["--max_steps", "20", "--batch_size", "8", "--device", "cpu"]
    words = ["train", "--shard_dir", str(run_dir), "--predictor", "interlayer", "--output_dir", str(stopped), *options]
    log = run_python(["-c", MORTAL_CHILD, *words], returncode=130)
    assert "finishing this step first" in log
    assert f"Go on with: expert-speculation {shlex.join(words)} --resume" in log
    assert load_checkpoint(stopped / "checkpoint.safetensors")[1]["progress"]["step"] == 13
    with pytest.raises(ConfigurationError, match="unfinished training; continue it with --resume"):
        train(settings(run_dir, stopped, max_steps=20))
    resumed = train(settings(run_dir, stopped, max_steps=20, resume=True))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = [[line["step"] for line in read_record(folder / "train.jsonl")] for folder in (whole, resumed)]
    assert steps[0] == steps[1]
    assert train(settings(run_dir, stopped, max_steps=20, resume=True)) == stopped


def test_one_and_two_processes_learn_the_same_from_the_same_steps(run_dir: Path, tmp_path: Path) -> None:
    train(settings(run_dir, tmp_path / "one", max_steps=6, batch_size=4, gradient_accumulation_steps=2))
    words = ["train", "--shard_dir", str(run_dir), "--predictor", "interlayer", "--output_dir", str(tmp_path / "two")]
    words += ["--max_steps", "6", "--batch_size", "4", "--gradient_accumulation_steps", "2", "--device", "cpu"]
    words += [f"--option={name}={value}" for name, value in SMALL.items()]
    run_python(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "expert_speculation", *words]
    )
    one, two = (load_predictor(tmp_path / name) for name in ("one", "two"))
    assert (one.provenance_["processes"], two.provenance_["processes"]) == (1, 2)
    for name in ("steps", "trained_tokens", "validation_recall"):
        assert one.provenance_[name] == two.provenance_[name]
    for name, tensor in one.state().items():  # with noise: both draw the same for each micro-batch
        torch.testing.assert_close(tensor, two.state()[name], atol=1e-3, rtol=0)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_options_of_the_predictor_are_checked_before_anything_is_done(run_dir: Path, tmp_path: Path) -> None:
    assert parse_options(["reach=2", "loss=set", "decays=[0.5]", "tokens=true"]) == {
        "reach": 2,
        "loss": "set",
        "decays": [0.5],
        "tokens": True,
    }
    with pytest.raises(ConfigurationError, match="--option reach: wanted NAME=VALUE"):
        parse_options(["reach"])
    with pytest.raises(ConfigurationError, match="--option depth: unknown to interlayer; its options are hidden_size"):
        train(TrainSettings(run_dir, "interlayer", tmp_path / "p", options={"depth": 3}))
    with pytest.raises(ConfigurationError, match=r'--option reach="far": wanted something like \d'):
        train(TrainSettings(run_dir, "interlayer", tmp_path / "p", options={"reach": "far"}))
    with pytest.raises(ConfigurationError, match="--option tokens: unknown to markov; it has no options"):
        train(TrainSettings(run_dir, "markov", tmp_path / "p", tokens=True))
    folder = train(settings(run_dir, tmp_path / "p", max_steps=2, tokens=True))
    assert load_predictor(folder).options()["tokens"]
    assert load_predictor(folder).provenance_["columns"] == ["ids", "weights", "tokens"]


def test_what_it_was_trained_on_is_in_the_provenance(run_dir: Path, tmp_path: Path) -> None:
    folder = train(TrainSettings(run_dir, "markov", tmp_path / "p", only_dataset=("code",), train_tokens=200))
    made = load_predictor(folder).provenance_
    assert made["datasets"] == made["only_dataset"] == ["code"]
    assert made["train_tokens_limit"] == 200
    assert 200 <= made["train_tokens"] < 240
    assert made["peak_host_memory_gb"] > 0.05
    card = (folder / "README.md").read_text()
    assert "the first 200 tokens" in card


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
