"""`verify` on the command line: exit codes, one line per fault, repairs, and the machine-readable result."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def run(command, tmp_path) -> Path:
    """A run of one shard."""
    ids = np.random.default_rng(0).random((4, 2, 8)).argsort(-1)[..., :2]
    packed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "shape": [4, 2, 2], "routed_experts": packed}) + "\n")
    told = ("--num_experts", 8, "--model_name", "m", "--output_dir", tmp_path / "run")
    code, _, error = command("import", tmp_path / "a.jsonl", "--format", "requests", *told)
    assert code == 0, error
    return tmp_path / "run"


def test_sound_run_and_bare_shards_exit_0_and_say_what_was_checked(command, run):
    assert command("verify", run) == (0, f"{run}: no fault found in 1 shard\n", "")
    bare = (run / "data").rename(run.parent / "bare")
    code, out, _ = command("verify", bare)
    assert (code, out) == (
        0,
        f"{bare}: no fault found in 1 bare shard, with neither plan nor manifest to compare with\n",
    )


def test_faults_exit_3_with_a_line_each_on_stdout_and_in_the_json_file(command, run):
    manifest, card = run / "manifest.jsonl", run / "README.md"
    manifest.unlink()
    card.unlink()
    code, out, error = command("verify", run, "--json", run.parent / "result.json")
    assert code == 3
    assert [line.partition(";")[0] for line in out.splitlines()] == [f"{manifest}: missing", f"{card}: missing"]
    assert error == f"Error: {run}: 2 faults found\n"
    result = json.loads((run.parent / "result.json").read_text())
    assert (result["shards"], result["actions"]) == (1, [])
    assert [(fault["path"], fault["problem"]) for fault in result["faults"]] == [
        (str(manifest), "missing"),
        (str(card), "missing"),
    ]
    assert all("verify --repair" in fault["remedy"] for fault in result["faults"])


def test_repair_says_what_it_does_and_exits_0_where_all_is_sound_and_3_where_it_is_not(command, run):
    (run / "manifest.jsonl").unlink()
    code, out, _ = command("verify", run, "--repair", "--json", run.parent / "result.json")
    assert code == 0
    assert out.splitlines() == [
        f"{run}/manifest.jsonl: written anew (0 lines kept, 1 rebuilt, 0 dropped)",
        f"{run}/README.md: written anew",
        f"{run}: no fault found in 1 shard",
    ]
    assert json.loads((run.parent / "result.json").read_text())["actions"] == out.splitlines()[:2]
    (run / "data" / "train-00000.parquet").write_bytes(b"")
    code, out, error = command("verify", run, "--repair")
    assert code == 3
    assert "moved to damaged/train-00000.parquet (has 0 bytes" in out
    assert "1 of 1 planned shards are not there yet; run the command that wrote the folder again with --resume" in out
    assert error == f"Error: {run}: 1 fault found\n"


def test_nothing_to_check_or_to_repair_by_exits_2(command, run, tmp_path):
    assert command("verify", tmp_path / "none")[0] == 2
    (tmp_path / "empty").mkdir()
    assert command("verify", tmp_path / "empty")[0] == 2
    (run / "plan.json").unlink()
    assert command("verify", run)[0] == 3
    code, out, error = command("verify", run, "--repair")
    assert (code, out) == (2, "")
    assert error.startswith(f"Error: {run}/plan.json: missing")
