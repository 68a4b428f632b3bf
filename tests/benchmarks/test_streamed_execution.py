"""The benchmarks of streaming, at a size at which they take seconds; what needs a GPU is left to one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import streamed_gpu
from loading_memory import write_checkpoint
from streamed_execution import OVER_CAP, drop_cache, offloaded, random_batches, streamed

BENCHMARKS = Path(streamed_gpu.__file__).parent
SHAPE = {"width": 128, "intermediate": 64, "vocabulary": 512, "head": 32}
LAYER = 8 * 3 * 128 * 64 * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, 3 * LAYER / 1e9, **SHAPE)
    return folder


def test_streamed_and_offloaded_models_choose_the_same_experts(model: Path) -> None:
    batches = random_batches(2, 128)
    ours = streamed(model, batches)
    theirs = offloaded(model, batches, {"cpu": 3 * LAYER})
    assert ours["ids"] == theirs["ids"]
    assert len(set(ours["ids"])) == 2


def test_without_a_cache_the_weights_come_from_the_disk_once_a_pass_or_once_a_batch(model: Path) -> None:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    drop_cache(model)
    if streamed(model, random_batches(1, 64))["start_read"] == 0:
        pytest.skip("this file system counts no reads from a disk")
    batches = random_batches(3, 64)
    assert streamed(model, batches)["read"] <= 1.5 * size
    assert offloaded(model, batches, {"cpu": 2 * LAYER})["read"] > 1.5 * LAYER


def test_a_process_above_the_cap_ends_and_says_so(model: Path) -> None:
    command = [
        sys.executable,
        BENCHMARKS / "streamed_execution.py",
        "--cap_gb",
        "0.00001",
        "--child",
        "streamed",
        model,
    ]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert ended.returncode == OVER_CAP
    assert "GB of own pages exceed the cap" in ended.stderr


def test_the_models_of_the_gpu_benchmark_are_traced_streamed_and_resident_alike(tmp_path: Path) -> None:
    streamed_gpu.write_models(tmp_path, 2, "cpu", **SHAPE)
    batches = random_batches(2, 128)
    ours, theirs = (
        streamed_gpu.run(mode, tmp_path, batches, "cpu", 10**9) for mode in ("streamed NF4", "resident NF4")
    )
    assert ours["ids"] == theirs["ids"]
    assert ours["ids"] != streamed_gpu.run("streamed bf16", tmp_path, batches, "cpu", 10**9)["ids"]
    assert json.dumps(ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_2() -> None:
    ended = CliRunner().invoke(streamed_gpu.main)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == f"torch {torch.__version__} finds no CUDA device here, so nothing was measured\n"
