"""collect -> verify -> train -> evaluate -> report, as commands, on a random Mixtral in the published layout."""

import json
import re

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from traces.manifest import read_manifest

polars = pytest.importorskip("polars", reason="polars comes with the dev extra")


def test_the_published_layout_was_what_collect_loaded(model_dir, run_dir):
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.block_sparse_moe.experts.7.w1.weight" in index
    assert len(set(index.values())) > 1
    assert sum(line.tokens for line in read_manifest(run_dir)) > 0


def test_traces_are_balanced_to_within_one_and_shards_hold_whole_sequences(run_dir):
    sequences = pq.read_table(run_dir / "plan.parquet").to_pandas()
    counts = sequences.groupby("dataset").size()
    assert counts.sum() == 161
    assert counts.max() - counts.min() <= 1
    shards = sorted((run_dir / "data").iterdir())
    assert len(shards) > 1
    seen = [set(pq.read_table(shard, columns=["sequence_id"])["sequence_id"].to_pylist()) for shard in shards]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 161


def test_datasets_and_polars_count_the_rows_that_the_manifest_states(run_dir, tmp_path):
    rows = sum(line.tokens for line in read_manifest(run_dir))
    loaded = load_dataset("parquet", data_dir=str(run_dir / "data"), split="train", cache_dir=str(tmp_path))
    assert len(loaded) == rows
    assert polars.scan_parquet(run_dir / "data" / "*.parquet").select(polars.len()).collect().item() == rows


def test_verify_and_info_accept_the_run(run_dir, command, capsys):
    assert command("verify", run_dir) == 0
    assert command("info", run_dir) == 0
    assert "sequences       161" in capsys.readouterr().out


def test_predictors_are_trained_evaluated_and_reported(run_dir, command, tmp_path, capsys):
    folders = []
    for name, limits in (("interlayer", ("--epochs", 1)), ("gate_lookahead", ()), ("markov", ())):
        folders.append(tmp_path / name)
        assert command("train", "--shard_dir", run_dir, "--predictor", name, "--output_dir", folders[-1], *limits) == 0
        assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in folders[-1].iterdir()}
        assert command("info", folders[-1]) == 0
    named = [word for folder in folders for word in ("--predictor_dir", folder)]
    assert command("evaluate", "--shard_dir", run_dir, *named, "--json", tmp_path / "e.json") == 0
    assert "interlayer" in capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text())
    assert {"interlayer", "gate_lookahead", "markov", "chance", "frequency", "repeat"} <= result["predictors"].keys()
    recall = result["predictors"]["gate_lookahead"]["recall"]["2"]
    assert 0 <= recall["low"] <= recall["value"] <= recall["high"] <= 1
    assert result["predictors"]["chance"]["recall"]["2"]["value"] == pytest.approx(2 / 8)
    page = tmp_path / "report.html"
    code = command("report", "--shard_dir", run_dir, *named, "--evaluation", tmp_path / "e.json", "--output", page)
    assert code == 0
    markup = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert "interlayer" in markup
    assert not re.search(r"""<script[^>]+src=|(?:src|href)=["']?(?:https?:)?//""", markup)


def test_a_source_that_falls_short_exits_3_with_counts_and_keeps_what_there_was(
    model_dir, texts, command, tmp_path, capsys
):
    arguments = ("--datasets", f"prose={texts / 'prose.jsonl'}", "--target_traces", 500, "--max_length", 40)
    assert command("collect", "--model", model_dir, *arguments, "--output_dir", tmp_path / "run") == 3
    assert "prose gave 120 of 500 from 120 rows" in capsys.readouterr().err
    assert command("verify", tmp_path / "run") == 0
