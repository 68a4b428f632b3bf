"""`import` and `export` on the command line: exit codes, what is printed, and the machine-readable account."""

import base64
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

from expert_speculation.verbs.import_ import FORMATS
from traces.interchange.exporting import WRITERS
from traces.plan import Plan
from traces.reader import TraceDataset
from traces.writer import ShardWriter, lock_run


@pytest.fixture
def requests(tmp_path):
    """Return a file of five requests, the last two without choices."""
    lines = []
    for number in range(5):
        ids = np.random.default_rng(number).random((4, 2, 8)).argsort(-1)[..., :2]
        packed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
        lines.append({"id": number, "shape": [4, 2, 2], "routed_experts": packed if number < 3 else None})
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def options(path, run_dir, *more):
    told = ("--num_experts", 8, "--model_name", "m", "--output_dir", run_dir)
    return "import", path, "--format", "requests", *told, *more


def test_an_incomplete_source_exits_3_and_its_account_is_printed_and_written(command, requests, tmp_path):
    code, out, error = command(*options(requests, tmp_path / "run", "--json", tmp_path / "result.json"))
    assert code == 3
    assert out.splitlines()[:2] == [
        "left out, not a record: 2",
        f"  {requests}:4: routed_experts is NoneType, wanted base64 text",
    ]
    assert "sequences                   3" in out
    assert error == f"Error: {tmp_path}/run: holds all that is complete, 2 records are left out (2 not a record)\n"
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["sequences"], result["tokens"]) == (3, 12)
    assert result["dropped"]["not a record"]["count"] == 2
    assert TraceDataset(tmp_path / "run").num_sequences == 3


def test_a_complete_source_exits_0_and_comes_back_by_the_printed_command(command, requests, tmp_path):
    requests.write_text("".join(requests.read_text().splitlines(keepends=True)[:3]))
    code, _, error = command(*options(requests, tmp_path / "run", "--moe_layers", "1,3"))
    assert (code, error) == (0, "")
    for record_format in FORMATS:
        out_dir = tmp_path / record_format
        code, out, _ = command(
            "export", "--shard-dir", tmp_path / "run", "--format", record_format, "--output_dir", out_dir
        )
        assert code == 0
        first, last = out.splitlines()
        assert first.startswith(f"{out_dir}: 3 sequences, 12 tokens in ")
        words = shlex.split(last.removeprefix("Back again: expert-speculation "))
        back = tmp_path / f"{record_format}-back"
        words[words.index("DIR")] = str(back)
        assert command(*words)[0] == 0
        assert TraceDataset(back).spec.moe_layers == (1, 3)


def test_nothing_usable_exits_3_writes_nothing_and_says_why(command, requests, tmp_path):
    code, out, error = command(*options(requests, tmp_path / "run", "--top_k", 4))
    assert code == 3
    assert "left out, experts per token contradict the options: 3" in out
    assert "  and 1 more" not in out
    assert error.startswith(
        f"Error: {tmp_path}/run: nothing was written, for no record can be used (3 experts per token"
    )
    assert not (tmp_path / "run").exists()
    requests.write_text("\n")
    code, _, error = command(*options(requests, tmp_path / "run"))
    assert code == 3
    assert error == f"Error: {tmp_path}/run: nothing was written, for the files hold no record\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--moe_layers", "1-x"], "--moe_layers 1-x: '1-x' is no layer"),
        (["--field", "layer=l"], "--field is for the format records"),
        (["--field", "layer"], "'layer' is not NAME=KEY"),
        (["--num_experts", "0"], "--num_experts 0: must be in"),
        (["--phase", "warm"], "'warm' is not one of 'prefill', 'decode'"),
        (["--format", "csv"], "'csv' is not one of 'requests', 'sglang'"),
        (["no_such_file"], "no_such_file: no such plain file"),
    ],
)
def test_wrong_usage_exits_2_with_nothing_written(more, message, command, requests, tmp_path):
    code, out, error = command(*options(requests, tmp_path / "run", *more))
    assert (code, out) == (2, "")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_export_refuses_a_used_folder(command, requests, tmp_path):
    command(*options(requests, tmp_path / "run"))
    code, _, error = command("export", "--shard_dir", tmp_path / "run", "--format", "vllm", "--output_dir", tmp_path)
    assert code == 2
    assert f"{tmp_path}: is not empty; choose another --output_dir" in error


def test_export_says_on_stderr_what_no_format_carries(command, requests, tmp_path):
    command(*options(requests, tmp_path / "run"))
    plan = Plan.load(tmp_path / "run")
    with_logits = replace(plan, spec=replace(plan.spec, store=("logits",)))
    with lock_run(tmp_path / "logits"):
        with_logits.save(tmp_path / "logits")
        with ShardWriter(tmp_path / "logits", with_logits.spec, plan.shards[0]) as writer:
            for sequence in TraceDataset(tmp_path / "run").sequences(columns=("tokens",)):
                writer.write(replace(sequence, router_logits_TLE=np.zeros((4, 2, 8), np.float16)))
            writer.commit()
    told = ("--shard_dir", tmp_path / "logits", "--format", "sglang", "--output_dir", tmp_path / "out")
    code, _, error = command("export", *told)
    assert (code, error) == (0, "router_logits is left out: sglang has no place for it\n")


def test_every_format_can_be_chosen():
    assert list(FORMATS) == list(WRITERS)
