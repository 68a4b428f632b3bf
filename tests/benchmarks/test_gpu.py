"""What a machine without a GPU can tell of benchmarks/gpu.py: its parts on a CPU, and how it ends there."""

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu import live_us, main, random_traces, training_rate, transfer_us, untrained

from speculation.interlayer import InterLayer
from speculation.predictor import RoutingShape
from speculation.training.view import TrainingView
from traces.reader import TraceDataset

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "mlp_size": 16, "copy_key_size": 8, "context_size": 16, "window": 6}
SHAPE = RoutingShape(3, 8, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_2():
    ended = CliRunner().invoke(main)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == f"torch {torch.__version__} finds no CUDA device here, so nothing was measured\n"


def test_it_times_every_layer_of_the_tokens_asked_for_with_the_window_empty_and_full():
    found = live_us(untrained(SHAPE, CPU, **SMALL), tokens=2, graphs=True)
    assert {window: len(times) for window, times in found.items()} == {"empty": 6, "full": 6}
    assert min(map(min, found.values())) > 0


def test_a_larger_expert_takes_longer_to_come():
    assert transfer_us(CPU, 50_000_000) > transfer_us(CPU, 50_000) > 0


def test_it_trains_on_random_traces_of_the_shape_wanted(tmp_path):
    dataset = TraceDataset(random_traces(tmp_path / "run", SHAPE, sequences=12))
    assert RoutingShape.of(dataset) == SHAPE
    assert dataset.num_tokens == 12 * 250
    predictor = InterLayer(hidden_size=8, mlp_size=8, copy_heads=0, context_size=0)
    rate, peak = training_rate(predictor, TrainingView(dataset), "float32", 24.0, 40, 40)
    assert rate > 0
    assert 0 < peak < 24
