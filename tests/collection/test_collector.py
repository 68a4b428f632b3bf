"""Whole collection runs on a tiny random Mixtral: what is stored is what the model routed, and failures say why."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from collection.collector import CollectResult, collect, dry_run
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError, IncompleteError
from moe.load import load_model, load_tokenizer
from moe.resident import ResidentTracer
from moe.routers import find_routers
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.plan import Plan
from traces.reader import TraceDataset
from traces.schema import SequenceTrace
from traces.verify import verify

Make = Callable[..., CollectSettings]
ALL = ("weights", "logits", "lookahead", "tokens")


@pytest.fixture
def two_files(tmp_path: Path, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]) -> str:
    """Return `--datasets` for two files of 30 texts each."""
    paths = [write_texts(tmp_path / name, make_texts(30, seed)) for seed, name in enumerate(("one.jsonl", "two.txt"))]
    return ",".join(map(str, paths))


def read(run_dir: Path) -> list[SequenceTrace]:
    return list(TraceDataset(run_dir).sequences(columns=ALL))


def assert_equal(left: list[SequenceTrace], right: list[SequenceTrace]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.dataset, a.sequence_id, a.sequence_key, a.tokens_T) == (
            *(b.dataset, b.sequence_id, b.sequence_key, b.tokens_T),
        )
        assert np.array_equal(a.token_ids_T, b.token_ids_T)
        assert np.array_equal(a.expert_ids_TLK, b.expert_ids_TLK)
        assert a.routing_weights_TLK is not None
        assert b.routing_weights_TLK is not None
        assert np.allclose(a.routing_weights_TLK, b.routing_weights_TLK, atol=1e-3)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".parquet"])
def test_a_local_file_of_any_format_becomes_a_sound_run(
    tmp_path: Path,
    make_settings: Make,
    make_texts: Callable[..., list[str]],
    write_texts: Callable[..., Path],
    suffix: str,
) -> None:
    texts = make_texts(12)
    path = write_texts(tmp_path / f"mine{suffix}", texts)
    result = collect(make_settings(datasets=str(path), target_traces=5, max_length=256))
    assert (result.sequences, result.run_dir) == (5, tmp_path / "run")
    assert verify(result.run_dir) == []
    assert (result.run_dir / "README.md").read_text().startswith("---")
    for sequence in read(result.run_dir):
        row = int(sequence.sequence_key.removeprefix(f"mine{suffix}#"))
        # Bytes that are only a part of a character read U+FFFD; all else is the text itself.
        written = "".join(sequence.tokens_T).replace("�", "").replace("🙂", "")
        assert written == "<s>" + texts[row].replace("🙂", "")
        assert AutoTokenizer.from_pretrained(make_settings().model).decode(sequence.token_ids_T[1:]) == texts[row]


def test_stored_routing_equals_that_of_each_sequence_alone(make_settings: Make, two_files: str) -> None:
    settings = make_settings(datasets=two_files, store=("weights", "logits", "lookahead"), lookahead=2, max_length=200)
    run_dir = collect(settings).run_dir
    loaded = load_model(settings.model, device="cpu")
    routers = find_routers(loaded.model)
    lengths = set()
    with ResidentTracer(loaded.model, routers, ("weights", "logits", "lookahead"), 2) as tracer:
        for sequence in read(run_dir):
            tokens = sequence.num_tokens
            lengths.add(tokens)
            ids = torch.from_numpy(sequence.token_ids_T).long()[None]
            alone = tracer.trace(ids, torch.tensor([tokens]))
            assert np.array_equal(sequence.expert_ids_TLK, alone.expert_ids_BTLK[0].numpy())
            for stored, direct in (
                (sequence.routing_weights_TLK, alone.routing_weights_BTLK),
                (sequence.router_logits_TLE, alone.router_logits_BTLE),
                (sequence.lookahead_logits_THLE, alone.lookahead_logits_BTHLE),
            ):
                assert stored is not None
                assert direct is not None
                assert stored.shape == direct[0].shape
                assert np.allclose(stored, direct[0].numpy(), atol=2e-3)
    assert len(lengths) > 3  # else there was no padding to get wrong
    spec = TraceDataset(run_dir).spec
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.horizons) == (4, 8, 2, 2)


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({"store": ()}, set()),
        ({"store": ("lookahead", "weights")}, {"weights", "lookahead"}),
        ({"store": ("logits",), "lookahead": 1}, {"logits", "lookahead"}),
    ],
)
def test_the_columns_asked_for_are_stored_and_no_others(
    make_settings: Make, two_files: str, changes: dict[str, Any], columns: set[str]
) -> None:
    result = collect(make_settings(datasets=two_files, target_traces=2, **changes))
    assert TraceDataset(result.run_dir).available == {"ids", "tokens", *columns}


def test_same_seed_gives_equal_traces_and_other_batches_give_the_same_experts(
    tmp_path: Path, make_settings: Make, two_files: str
) -> None:
    runs = [
        read(collect(make_settings(datasets=two_files, output_dir=tmp_path / f"run{number}", **changes)).run_dir)
        for number, changes in enumerate(({}, {}, {"batch_size": 1}, {"batch_tokens": 4096}, {"seed": 1}))
    ]
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])
    assert_equal(runs[0], runs[3])
    assert [each.sequence_key for each in runs[0]] != [each.sequence_key for each in runs[4]]


def test_shards_each_hold_a_balanced_mix_and_other_programs_count_the_manifests_rows(
    make_settings: Make, two_files: str, tmp_path: Path
) -> None:
    result = collect(make_settings(datasets=two_files, target_traces=41, shard_size_mb=0.01))
    assert result.shards > 3
    plan = Plan.load(result.run_dir)
    assert [source["available"] for source in plan.sources] == [21, 20]
    names = plan.sequences["dataset"].to_pylist()
    for shard in plan.shards:
        own = names[shard.first_sequence : shard.stop_sequence]
        assert abs(own.count("one") - own.count("two")) <= 2
    lines = read_manifest(result.run_dir)
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(result.run_dir / "data"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert loaded.num_rows == sum(line.tokens for line in lines) == result.tokens
    assert verify(result.run_dir) == []


def test_a_source_that_is_too_small_gives_all_it_has_and_the_result_says_so(
    tmp_path: Path, make_settings: Make, two_files: str, make_texts: Callable[..., list[str]]
) -> None:
    small = tmp_path / "small.txt"
    small.write_text("\n".join([*make_texts(2, 7), *make_texts(1, 7), "short", ""]))
    settings = make_settings(datasets=f"{small},{two_files.split(',')[0]}")
    foretold = dry_run(settings)["shortfall"]
    assert (
        foretold
        == collect(settings).shortfall
        == (
            "6 of 8 sequences: small gave 2 of 4 from 4 rows (1 duplicate, 1 shorter than 8 tokens); "
            "name larger data sets, or lower --target_traces or --min_tokens"
        )
    )
    assert verify(tmp_path / "run") == []
    assert len(read(tmp_path / "run")) == 6
    source = Plan.load(tmp_path / "run").sources[0]
    assert (source["requested"], source["available"]) == (4, 2)
    assert source["skipped"] == {"duplicate": 1, "shorter than 8 tokens": 1}


def test_a_run_without_any_usable_text_writes_nothing(tmp_path: Path, make_settings: Make) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    why = (
        "nothing was written, for there are 0 of 8 sequences: a gave 0 of 8 .* larger data sets, or lower --min_tokens"
    )
    with pytest.raises(IncompleteError, match=why):
        collect(make_settings(datasets=str(tmp_path / "a.txt")))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_foretells_the_run_and_writes_nothing(tmp_path: Path, make_settings: Make, two_files: str) -> None:
    settings = make_settings(datasets=two_files, target_traces=30, shard_size_mb=0.03)
    foretold = dry_run(settings)
    assert json.loads(json.dumps(foretold)) == foretold
    assert (foretold["quantization"], foretold["memory_bytes"]["needed"]) == (
        "none",
        foretold["model"]["parameter_bytes"]["total"],
    )
    assert not (tmp_path / "run").exists()
    result = collect(settings)
    facts = json.loads(json.dumps(result.facts()))
    for name in ("run_dir", "sequences", "tokens", "shards", "sources", "padding_share"):
        assert foretold[name] == facts[name]
    written = sum(line.bytes for line in read_manifest(result.run_dir))
    assert 0.2 < foretold["bytes"] / written < 2  # tiny shards: footers weigh more than routing


def test_resume_makes_missing_and_damaged_shards_again_and_changes_nothing_else(
    make_settings: Make, two_files: str
) -> None:
    settings = make_settings(datasets=two_files, target_traces=20, shard_size_mb=0.007)
    whole = collect(settings)
    before = read(whole.run_dir)
    paths = sorted((whole.run_dir / "data").iterdir())
    untouched = paths[2].stat().st_mtime_ns
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    paths[1].unlink()
    manifest = whole.run_dir / MANIFEST_NAME
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigurationError, match=r"run: is not empty; continue its run with --resume"):
        collect(settings)
    resumed: CollectResult = collect(replace(settings, resume=True))
    assert verify(resumed.run_dir) == []
    assert_equal(read(resumed.run_dir), before)
    assert paths[2].stat().st_mtime_ns == untouched


def test_resume_is_refused_where_the_folder_holds_no_run(tmp_path: Path, make_settings: Make, two_files: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigurationError, match=r"holds no plan\.json to resume"):
        collect(make_settings(datasets=two_files, resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_size_mb": 0}, "--shard_size_mb 0: must be above 0"),
        ({"shard_size_mb": float("nan")}, "--shard_size_mb nan: must be a finite number; give the megabytes"),
        ({"temperature": float("inf")}, "--temperature inf: must be a finite number; give 0, "),
        ({"temperature": -1.0}, "--temperature -1: must not be negative"),
        ({"memory_budget_gb": float("nan")}, "--memory_budget_gb nan: must be a finite number; give the gigabytes"),
        ({"memory_budget_gb": -1.0}, "--memory_budget_gb -1: must not be negative"),
        ({"output_dir": Path("s3://bucket/x")}, "--output_dir s3://bucket/x: is an address"),
        ({"target_traces": 0}, "--target_traces 0: must be at least 1"),
        ({"target_traces": -5}, "--target_traces -5: must be at least 1"),
        ({"max_length": 4}, "--min_tokens 8: exceeds --max_length 4"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"lookahead": -1}, "--lookahead -1: must not be negative"),
        (
            {"store": ("weights", "gradients")},
            "--store gradients: unknown column; choose among weights, logits, lookahead",
        ),
        ({"execution": "astral"}, "--execution astral: unknown"),
        ({"output_suffix": "b"}, "--output_suffix b: only lengthens the default"),
        ({"output_dir": None, "output_suffix": "a/b"}, "--output_suffix a/b: must not hold '/'"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(make_settings: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": "poems"}, "--datasets poems: unknown data set"),
        ({"model": "no/such/model"}, "no/such/model: no such folder"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"lookahead": 4}, "--lookahead 4: must be below the 4 MoE layers of tiny-mixtral"),
    ],
)
def test_runs_that_can_not_work_are_refused_before_anything_is_written(
    tmp_path: Path, make_settings: Make, two_files: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        collect(make_settings(**({"datasets": two_files} | changes)))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_before_the_model_is_looked_at(tmp_path: Path, make_settings: Make) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigurationError, match=r"run: is not empty; continue its run with --resume"):
        collect(make_settings(model=str(tmp_path / "no" / "model"), datasets="no.txt"))


@pytest.mark.parametrize("run", [collect, dry_run])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "nf4"}, "--quantization nf4: on a CPU bitsandbytes fails"),
        ({"attn_implementation": "paged|eager"}, "--attn_implementation paged|eager: unknown; use one of eager"),
        ({"experts_implementation": "none_such"}, "--experts_implementation none_such: unknown"),
    ],
)
def test_what_loading_would_refuse_is_refused_before_texts_are_read(
    tmp_path: Path, make_settings: Make, run: Callable[[CollectSettings], Any], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "never_read.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        run(make_settings(datasets=str(tmp_path / "never_read.txt"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_dense_model_is_refused(tmp_path: Path, make_settings: Make, two_files: str, model_dir: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).save_pretrained(tmp_path / "dense")
    load_tokenizer(str(model_dir)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigurationError, match="dense model"):
        collect(make_settings(datasets=two_files, model=str(tmp_path / "dense")))


def test_max_length_is_lowered_to_what_the_model_reads(
    make_settings: Make, two_files: str, capsys: pytest.CaptureFixture[str]
) -> None:
    foretold = dry_run(make_settings(datasets=two_files, max_length=5000))
    assert foretold["sequences"] == 8
    assert "tiny-mixtral reads at most 256 tokens: --max_length 5000 is lowered to that" in capsys.readouterr().err


def test_options_without_effect_are_named(
    make_settings: Make, two_files: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(make_settings(datasets=two_files, temperature=0, lookahead_norm="own"))
    said = capsys.readouterr().err
    assert "--temperature 0 has no effect without --generate" in said
    assert "--lookahead_norm own has no effect without --lookahead" in said
    dry_run(make_settings(datasets=two_files, temperature=0, generate=2, lookahead_norm="own", lookahead=1))
    assert "no effect" not in capsys.readouterr().err


def test_the_default_folder_is_called_after_the_model_and_the_suffix() -> None:
    assert CollectSettings(output_suffix="b").run_dir("mistralai/Mixtral-8x7B-v0.1") == Path(
        "routing_data/Mixtral-8x7B-v0.1_b"
    )


def test_a_full_disk_is_foreseen(
    tmp_path: Path, make_settings: Make, two_files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigurationError, match=r"run: about 0\.00 GB are needed there and 0\.00 GB are free"):
        collect(make_settings(datasets=two_files))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
