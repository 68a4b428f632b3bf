"""`report`: what it refuses, each in one sentence with exit code 2 and before it has worked."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_speculation.command import main
from traces.plan import PlannedShard
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same texts, routed apart from each other."""
    spec = TraceSpec(
        model_name="tiny", model_revision=None, num_layers=3, num_experts=4, top_k=2, moe_layers=(0, 1, 2),
        expert_order="weight", weights_normalized=None, quantization="none", model_dtype="float32",
        router_dtype="float32", attn_implementation=None, experts_implementation=None, library_versions={},
        tokenizer_hash=None, seed=0, plan_fingerprint="made up", store=(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 99, 12).astype(np.int32) for _ in range(40)]
    folders = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp("runs") / name
        with ShardWriter(folder, replace(spec, quantization="nf4" if name == "second" else "none"),
                         PlannedShard(0, 0, len(texts), 12 * len(texts))) as writer:  # fmt: skip
            for number, ids_T in enumerate(texts):
                chosen_TLK = np.argsort(rng.random((12, 3, 4)), axis=-1)[..., :2].astype(np.uint8)
                writer.write(
                    SequenceTrace("code", number, str(number), ids_T, [""] * 12, np.zeros(12, np.uint8), chosen_TLK)
                )
            writer.commit()
        folders.append(folder)
    return folders


def report(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["report", *map(str, arguments)])
    return int(exit_.value.code or 0), capsys.readouterr().err


def test_two_runs_are_laid_side_by_side(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (tmp_path / "report.html", tmp_path / "report.json")
    code, _ = report(
        "--shard_dir", runs[0], "--shard_dir", runs[1], "--output", files[0], "--json", files[1], "--journeys", 1,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0
    numbers = json.loads(files[1].read_text())
    assert [run["name"] for run in numbers["comparison"]["runs"]] == ["first", "second"]
    assert numbers["comparison"]["matched_sequences"] == 40
    assert numbers["comparison"]["agreement"]["shared"]["value"] == pytest.approx(0.5, abs=0.05)
    assert "Comparison of two runs" in files[0].read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--shard_dir", "A", "--shard_dir", "B", "--shard_dir", "A"), "3 folders, wanted one, or two to compare"),
        (("--shard_dir", "A", "--shard_dir", "NONE"), "NONE"),
        (("--shard_dir", "A", "--evaluation", "NONE"), "evaluate --json"),
        (("--shard_dir", "A", "--evaluation", "TEXT"), "evaluate --json"),
        (("--shard_dir", "A", "--evaluation", "LIST"), "not what 'expert-speculation evaluate --json' writes"),
        (("--shard_dir", "A", "--evaluation", "LIST", "--horizon", "2"), "leave one of them out"),
        (("--shard_dir", "A", "--simulation", "NONE"), "simulate --json"),
        (("--shard_dir", "A", "--simulation", "TEXT"), "simulate --json"),
        (("--shard_dir", "A", "--simulation", "LIST"), "not what 'expert-speculation simulate --json' writes"),
        (("--shard_dir", "A", "--horizon", "2"), "name one with --predictor_dir"),
        (("--shard_dir", "A", "--output", "FOLDER"), "is a folder, wanted a file"),
        (("--shard_dir", "A", "--figures", "TEXT"), "is a file, wanted a folder"),
        (("--shard_dir", "A", "--journeys", "-1"), "--journeys"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(
    runs: list[Path],
    tmp_path: Path,
    given: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text("no json")
    (tmp_path / "list").write_text('["format_version"]')
    places = {
        "A": runs[0], "B": runs[1], "NONE": tmp_path / "none", "TEXT": tmp_path / "text", "LIST": tmp_path / "list",
        "FOLDER": tmp_path,
    }  # fmt: skip
    output = tmp_path / "report.html"
    arguments = [places.get(each, each) for each in given]
    code, error = report("--output", output, *arguments, capsys=capsys)
    assert code == 2
    assert sentence.replace("NONE", str(tmp_path / "none")) in error
    assert "Traceback" not in error
    assert not output.exists()
