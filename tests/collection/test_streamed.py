"""A streamed run writes what a resident one writes, byte for byte, also where it was killed or had no memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_models import tiny_model

from collection.collector import collect, dry_run
from collection.pass_state import WORKING_FOLDER, PassState
from collection.passes import cut_passes
from collection.settings import CollectSettings
from collection.streamed import KeptStates
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.plan import Plan, PlannedShard
from traces.reader import TraceDataset
from traces.verify import verify

Make = Callable[..., CollectSettings]
ALL = ("weights", "logits", "lookahead", "hidden")
STORED: dict[str, Any] = {"store": ("weights", "logits", "lookahead"), "lookahead": 2, "sample_hidden": 0.2}


@pytest.fixture
def texts(tmp_path: Path, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]) -> str:
    return str(write_texts(tmp_path / "texts.jsonl", make_texts(30, longest=30)))


def content(run_dir: Path) -> dict[str, tuple[pa.Table, Any]]:
    """Return rows and footer of each shard; its bytes may differ in what pyarrow leaves between values."""
    files = {path.name: pq.ParquetFile(path) for path in sorted((run_dir / "data").iterdir())}
    return {name: (file.read(), file.metadata.metadata) for name, file in files.items()}


def assert_same_run(one: Path, two: Path) -> None:
    assert verify(one) == verify(two) == []
    assert Plan.load(one).fingerprint == Plan.load(two).fingerprint
    assert content(one) == content(two)
    assert sorted(line.notes for line in read_manifest(one)) == sorted(line.notes for line in read_manifest(two))
    assert list((two / ".tmp").iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_tokens": 256},
        {"batch_size": 3, "dtype": "bfloat16", "attn_implementation": "eager", "experts_implementation": "eager"},
        {"batch_tokens": 128, "memory_budget_gb": 0.0},
        {"batch_tokens": 128, "lookahead_norm": "own"},
        {"quantization": "int8"},
    ],
)
def test_a_streamed_run_equals_a_resident_one_file_for_file(
    make_settings: Make, texts: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted = {"datasets": texts, "target_traces": 14, "shard_size_mb": 0.05} | STORED | changes
    whole = collect(make_settings(**wanted, output_dir=tmp_path / "whole")).run_dir
    run_dir = collect(make_settings(**wanted, output_dir=tmp_path / "streamed", execution="streamed")).run_dir
    assert len(content(whole)) > 2
    assert_same_run(whole, run_dir)
    assert Plan.load(run_dir).settings["execution"] == "streamed"


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[list[str]]]]:
    """Return the folder of the harness's runs, in memory where there is one, and what it says of each."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        command = [sys.executable, str(Path(__file__).with_name("streamed_harness.py")), made]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # for it forks
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        yield Path(made), [line.split("\t") for line in done.stdout.splitlines()]


def test_a_run_that_is_killed_anywhere_in_a_pass_is_resumed_to_the_same_files(
    fates: tuple[Path, list[list[str]]],
) -> None:
    folder, lines = fates
    assert len(content(folder / "whole")) > 3
    for name, place, ended, _, resumed in lines:
        assert (ended, resumed) == ("-9", "0"), (name, place)
        assert_same_run(folder / "whole", folder / name)
    places = {place for _, place, *_ in lines}
    assert {"serialize_file in save_file", "fsync in write_tensors", "replace in write_bytes"} <= places
    assert {"replace in list_shard", "rmdir in rmtree"} <= places
    assert {layers for *_, layers, _ in lines} == {"None", "1", "2"}, "not every stage of a pass was met"


class Blocks:
    """The feed-forward blocks that ran, counted; after number `interrupt_at` the process gets a SIGINT."""

    def __init__(self) -> None:
        self.count, self.interrupt_at = 0, 0

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, MixtralSparseMoeBlock):
            self.count += 1
            if self.count == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    counted = Blocks()
    handle = register_module_forward_hook(counted.note)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    yield counted
    signal.signal(signal.SIGINT, before)
    handle.remove()


def test_an_interrupt_finishes_the_batch_and_resuming_starts_at_the_layer_under_way(
    make_settings: Make, texts: str, tmp_path: Path, blocks: Blocks
) -> None:
    wanted = {"datasets": texts, "target_traces": 8, "batch_size": 2, "execution": "streamed"} | STORED
    whole = collect(make_settings(**wanted, output_dir=tmp_path / "whole")).run_dir
    looked_through, batches = 4, 4
    assert blocks.count == looked_through + 4 * batches
    blocks.count, blocks.interrupt_at = 0, looked_through + 2 * batches + 2
    settings = make_settings(**wanted)
    with pytest.raises(KeyboardInterrupt):
        collect(settings)
    assert blocks.count == blocks.interrupt_at
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / WORKING_FOLDER / "progress.json").read_text())["layers"] == 2
    assert not (run_dir / "data").exists()
    blocks.count = 0
    collect(replace(settings, resume=True))
    assert blocks.count == looked_through + 2 * batches
    assert_same_run(whole, run_dir)


def test_a_pass_that_was_interrupted_may_be_left_to_the_other_execution(
    make_settings: Make, texts: str, tmp_path: Path, blocks: Blocks
) -> None:
    wanted = {"datasets": texts, "target_traces": 8, "batch_size": 2}
    whole = collect(make_settings(**wanted, output_dir=tmp_path / "whole")).run_dir
    settings = make_settings(**wanted, execution="streamed")
    blocks.count, blocks.interrupt_at = 0, 4 + 2 * 4 + 2
    with pytest.raises(KeyboardInterrupt):
        collect(settings)
    assert (tmp_path / "run" / WORKING_FOLDER).exists()
    collect(replace(settings, execution="resident", resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_layers_without_experts_are_streamed_too(make_settings: Make, texts: str, tmp_path: Path) -> None:
    folder = tmp_path / "glm"
    tiny_model("glm4_moe", vocab_size=512).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(make_settings().model) / name, folder)
    wanted = {"model": str(folder), "datasets": texts, "target_traces": 8, "memory_budget_gb": 0.0} | STORED
    whole = collect(make_settings(**wanted, output_dir=tmp_path / "whole")).run_dir
    assert Plan.load(whole).spec.moe_layers == (1, 2, 3)
    assert_same_run(whole, collect(make_settings(**wanted, execution="streamed")).run_dir)


def test_a_run_may_be_continued_in_the_other_execution(make_settings: Make, texts: str, tmp_path: Path) -> None:
    wanted = {"datasets": texts, "target_traces": 14, "shard_size_mb": 0.05} | STORED
    whole = collect(make_settings(**wanted, output_dir=tmp_path / "whole")).run_dir
    for begun, continued in (("resident", "streamed"), ("streamed", "resident")):
        settings = make_settings(**wanted, output_dir=tmp_path / begun, execution=begun)
        run_dir = collect(settings).run_dir
        manifest = run_dir / MANIFEST_NAME
        manifest.write_bytes(manifest.read_bytes().splitlines(keepends=True)[0])
        collect(replace(settings, execution=continued, resume=True))
        assert_same_run(whole, run_dir)


def test_without_memory_for_hidden_states_they_are_read_back_and_with_it_not(
    make_settings: Make, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    stock = PassState.hidden
    monkeypatch.setattr(PassState, "hidden", lambda self, block: read.append(block) or stock(self, block))
    wanted = {"datasets": texts, "target_traces": 8, "batch_size": 2, "execution": "streamed"}
    collect(make_settings(**wanted, memory_budget_gb=0.01, output_dir=Path(make_settings().output_dir) / "kept"))
    assert read == []
    collect(make_settings(**wanted, memory_budget_gb=0.0, output_dir=Path(make_settings().output_dir) / "spilled"))
    assert read == [0, 0, 0]


def test_hidden_states_are_kept_up_to_the_budget() -> None:
    kept = KeptStates(250)
    for block in range(4):
        kept.put(block, {block: torch.zeros(100, dtype=torch.uint8)})
    assert [block for block in range(4) if kept.take(block)] == [0, 1]
    kept.put(7, {7: torch.zeros(250, dtype=torch.uint8)})
    assert list(kept.take(7)) == [7]
    assert kept.take(7) == {}


def test_a_damaged_state_names_the_file_and_the_way_out(
    make_settings: Make, texts: str, tmp_path: Path, blocks: Blocks
) -> None:
    settings = make_settings(datasets=texts, target_traces=8, batch_size=2, execution="streamed", memory_budget_gb=0)
    blocks.interrupt_at = 4 + 2 * 4 + 2
    with pytest.raises(KeyboardInterrupt):
        collect(settings)
    folder = tmp_path / "run" / WORKING_FOLDER
    (path,) = folder.glob("hidden-*/*")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigurationError, match=f"^{path}: can not be read .*; delete {folder}, which costs one pass"):
        collect(replace(settings, resume=True))
    (folder / "progress.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"progress\.json: can not be read"):
        collect(replace(settings, resume=True))
    shutil.rmtree(folder)
    collect(replace(settings, resume=True))
    assert verify(tmp_path / "run") == []


@pytest.fixture
def memory() -> Iterator[dict[str, int]]:
    """Return the most sequences that a Mixtral block has memory for, but for the first `spared` calls; set it."""
    limit = {"sequences": 1000, "spared": 0}

    def refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, MixtralSparseMoeBlock):
            limit["spared"] -= 1
            if limit["spared"] < 0 and args[0].shape[0] > limit["sequences"]:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {args[0].shape[0]} sequences")

    handle = register_module_forward_pre_hook(refuse)
    yield limit
    handle.remove()


def test_a_batch_that_does_not_fit_in_memory_runs_in_parts_which_the_manifest_says(
    make_settings: Make, texts: str, tmp_path: Path, memory: dict[str, int]
) -> None:
    wanted = {"datasets": texts, "target_traces": 9, "batch_size": 5, "execution": "streamed"} | STORED
    whole = collect(make_settings(**wanted, output_dir=tmp_path / "whole")).run_dir
    memory |= {"sequences": 2, "spared": 4 + 2}  # all the looking through, and the first layer
    run_dir = collect(make_settings(**wanted)).run_dir
    assert verify(run_dir) == []
    for left, right in zip(
        TraceDataset(whole).sequences(columns=ALL), TraceDataset(run_dir).sequences(columns=ALL), strict=True
    ):
        assert np.array_equal(left.expert_ids_TLK, right.expert_ids_TLK)
        assert np.array_equal(left.hidden_positions_N, right.hidden_positions_N)
        for name in ("routing_weights_TLK", "router_logits_TLE", "lookahead_logits_THLE", "router_input_NLD"):
            assert np.allclose(getattr(left, name), getattr(right, name), atol=2e-3), name
    (line,) = read_manifest(run_dir)
    assert len(line.notes) == 2
    assert line.notes[0].startswith("out of memory: the batch of 5 sequences from sequence ")
    assert all(note.endswith("ran in parts, from layer 1 on or in that layer alone") for note in line.notes)


def test_a_sequence_that_does_not_fit_alone_ends_the_run_and_loses_no_layer(
    make_settings: Make, texts: str, tmp_path: Path, memory: dict[str, int]
) -> None:
    settings = make_settings(datasets=texts, target_traces=8, batch_size=2, execution="streamed")
    memory |= {"sequences": 0, "spared": 4 + 4 + 2}
    with pytest.raises(ExpertSpeculationError, match=r"^sequence \d+ alone, padded to \d+ tokens, does not fit"):
        collect(settings)
    assert json.loads((tmp_path / "run" / WORKING_FOLDER / "progress.json").read_text())["layers"] == 1
    memory["sequences"] = 1000
    collect(replace(settings, resume=True))
    assert verify(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": 3}, "--generate 3: decodes token by token, .*; use --execution resident"),
        ({"batch_size": "auto", "batch_tokens": None}, "--batch_size auto: runs batches through the whole model"),
        ({"memory_budget_gb": -1.0}, "--memory_budget_gb -1: must not be negative"),
        ({"pass_tokens": 0}, "--pass_tokens 0: must be at least 1"),
    ],
)
def test_what_can_not_be_streamed_is_refused(make_settings: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_settings(execution="streamed", **changes)


def test_a_family_that_can_not_be_streamed_is_refused_before_anything_is_written(
    make_settings: Make, texts: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gemma"
    tiny_model("gemma4_text", vocab_size=512).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(make_settings().model) / name, folder)
    with pytest.raises(ConfigurationError, match=r"^--execution streamed: gemma4_text can not be run so"):
        collect(make_settings(model=str(folder), datasets=texts, execution="streamed", max_length=16))
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_dry_run_asks_for_the_memory_of_two_layers(make_settings: Make, texts: str) -> None:
    needed = {
        execution: dry_run(make_settings(datasets=texts, target_traces=5, execution=execution))["memory_bytes"][
            "needed"
        ]
        for execution in ("resident", "streamed")
    }
    (layer,) = {
        sum(tensor.nbytes for name, tensor in load_file(path).items() if f"layers.{number}." in name)
        for path in Path(make_settings().model).glob("*.safetensors")
        for number in range(4)
    }
    assert needed["resident"] - needed["streamed"] == 2 * layer


def test_passes_hold_whole_shards_up_to_a_number_of_tokens() -> None:
    shards = [PlannedShard(index, index, index + 1, tokens) for index, tokens in enumerate([50, 50, 1, 300, 60, 39])]
    passes = cut_passes(shards, 100)
    assert [[shard.num_tokens for shard in each] for each in passes] == [[50, 50], [1], [300], [60, 39]]
    assert cut_passes([], 100) == []
