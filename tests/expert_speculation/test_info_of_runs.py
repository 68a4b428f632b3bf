"""`info RUN`: what a run holds, and what one that has finished nothing is to become."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def run(command, tmp_path) -> Path:
    """A run of three sequences of four tokens, of two data sets, in a shard."""
    packed = base64.b64encode(np.tile([0, 1], (4, 2, 1)).astype("<i4").tobytes()).decode()
    for name, count in (("a", 2), ("b", 1)):
        lines = [{"id": f"{name}{n}", "shape": [4, 2, 2], "routed_experts": packed} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = ("--num_experts", 8, "--model_name", "m", "--output_dir", tmp_path / "run")
    code, _, error = command("import", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--format", "requests", *told)
    assert code == 0, error
    return tmp_path / "run"


def facts_of(command, path: Path) -> dict[str, str]:
    code, out, error = command("info", path)
    assert (code, error) == (0, "")
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in out.splitlines())}


def test_a_finished_run_says_what_it_holds(command, run):
    facts = facts_of(command, run)
    assert (facts["kind"], facts["model"], facts["experts (E)"]) == ("trace folder", "m", "8")
    assert (facts["shards"], facts["sequences"], facts["tokens"]) == ("1", "3", "12")
    assert "state" not in facts


@pytest.mark.parametrize("has_data", [False, True])
def test_a_run_without_a_finished_shard_says_what_is_planned_and_how_it_goes_on(command, run, has_data):
    finished = facts_of(command, run)
    for name in ("manifest.jsonl", "README.md"):
        (run / name).unlink()
    shutil.rmtree(run / "data")
    if has_data:
        (run / "data").mkdir()
    facts = facts_of(command, run)
    assert (facts["shards"], facts["planned shards"]) == ("0", "1")
    assert (facts["planned sequences"], facts["planned tokens"]) == ("3", "12")
    assert facts["state"] == "no shard is finished yet; an interrupted run goes on with --resume"
    same = ("kind", "model", "precision", "MoE layers (L)", "experts (E)", "per token (K)", "data sets")
    assert [facts[name] for name in same] == [finished[name] for name in same]
    if has_data:
        assert facts_of(command, run / "data") == facts


def test_a_run_that_is_not_planned_yet_is_no_model(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    code, _, error = command("info", tmp_path / "run")
    assert code == 2
    assert error.startswith(f"Error: {tmp_path / 'run'}: a run that has no plan yet; wait for it, or ")


@pytest.mark.parametrize("verb", ["train", "evaluate", "report"])
def test_verbs_that_need_traces_say_that_none_is_finished(command, run, tmp_path, verb):
    (run / "manifest.jsonl").unlink()
    shutil.rmtree(run / "data")
    given = {
        "train": ("--predictor", "markov", "--output_dir", tmp_path / "out"),
        "evaluate": (),
        "report": ("--output", tmp_path / "report.html"),
    }
    code, _, error = command(verb, "--shard_dir", run, *given[verb])
    assert code == 2
    assert error.startswith(f"Error: {run}: none of its 1 planned shards is finished yet; wait for the run, or, ")
