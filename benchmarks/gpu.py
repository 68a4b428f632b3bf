"""What does InterLayer cost on a GPU: a live prediction beside an expert's transfer, and training within a budget?

    .venv/bin/python benchmarks/gpu.py [--shard_dir RUN] [--device cuda] [--memory_budget_gb 24] [--tokens 20]
        [--steps 100] [--skip_tests]

It needs no text, hub or network. Printed, for Mixtral-8x7B's shape and gpt-oss-20b's:

- microseconds from a layer's choice to the scores of the next one on the CPU, with CUDA graphs and without, for the
  first tokens of a sequence and with the window of attention full; beside them how long one expert takes from pinned
  memory to the GPU, measured and at 25 GB/s. Routing is random: which experts are chosen does not change the time.
- tokens per second of training, as `train` runs it with its reading and its validations, and the most memory that
  torch allocated, in bfloat16 and in float32, with steps of the default size and of 16384 tokens. The traces are
  `--shard_dir`'s, or random ones of the two shapes.
- how the tests went that need a GPU (pytest -m gpu).

It exits 1 where a prediction with a graph takes more than 175 us, memory exceeds the budget or a test fails, and 2
without a GPU.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from reader_memory import LENGTH, draw_sequence, make_spec

from groundwork.hardware import choose_device, describe_device
from groundwork.progress import log
from speculation.interlayer import InterLayer
from speculation.interlayer.live import InterLayerLive
from speculation.predictor import RoutingShape
from speculation.training.loop import RECORDED_STEPS, LoopSettings, fit_module
from speculation.training.memory import peaks_gb
from speculation.training.schedule import BATCH_TOKENS
from speculation.training.view import TrainingView
from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.writer import ShardWriter, lock_run

LIMIT_US = 175
STATED_GB_S = 25  # PCIe 4.0 x16 in practice
WARM_UP_TOKENS = 3
TRANSFERS = 20
LARGE_STEP = 16384  # tokens
SEQUENCES = 512


@dataclass(frozen=True)
class Traced:
    """A traced model: its shape, and the bytes of one expert as benchmarks/prediction_speed.py derives them."""

    name: str
    shape: RoutingShape
    expert_bytes: int


MODELS = (
    Traced("Mixtral-8x7B, NF4", RoutingShape(32, 8, 2), 91_000_000),
    Traced("gpt-oss-20b, MXFP4", RoutingShape(24, 32, 4), 13_200_000),
)


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), help="Traces to train on in place of random ones.")
@click.option("--device", "device_name", default="cuda", show_default=True)
@click.option("--memory_budget_gb", default=24.0, show_default=True)
@click.option("--tokens", default=20, show_default=True, help="Tokens timed for each latency.")
@click.option(
    "--steps", default=100, show_default=True, help=f"Training steps; the first {RECORDED_STEPS} are not timed."
)
@click.option("--skip_tests", is_flag=True)
def main(
    shard_dir: Path | None, device_name: str, memory_budget_gb: float, tokens: int, steps: int, skip_tests: bool
) -> None:
    """Print the tables."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device here, so nothing was measured", file=sys.stderr)
        sys.exit(2)
    device = choose_device(device_name)
    print(f"{describe_device(device)}; torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    good = print_latencies(device, tokens)
    if shard_dir is not None:
        print(f"\nTraining on the traces of {shard_dir}.\n")
        good &= print_training({str(shard_dir): shard_dir}, device, memory_budget_gb, steps)
    else:
        print("\nTraining on random routing, no --shard_dir was given: time and memory are those of real traces.\n")
        with tempfile.TemporaryDirectory() as folder:
            runs = {each.name: random_traces(Path(folder) / str(i), each.shape) for i, each in enumerate(MODELS)}
            good &= print_training(runs, device, memory_budget_gb, steps)
    if not skip_tests:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q"], cwd=Path(__file__).parents[1])
        print(f"\npytest -m gpu: {'passed' if tests.returncode == 0 else f'exit code {tests.returncode}'}")
        good &= tests.returncode == 0
    sys.exit(not good)


def print_latencies(device: torch.device, tokens: int) -> bool:
    """Prints the table of live predictions; returns whether those with graphs are within the limit."""
    print(
        "| model | expert | transfer, us | at 25 GB/s | window | no graphs, us (p95) | graphs, us (p95) | below 175 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for model in MODELS:
        copied, stated = transfer_us(device, model.expert_bytes), model.expert_bytes / STATED_GB_S / 1e3
        predictor = untrained(model.shape, device)
        eager, graphed = (live_us(predictor, tokens, graphs) for graphs in (False, True))
        for window in eager:
            low = float(np.median(graphed[window]))
            good &= low <= LIMIT_US
            print(
                f"| {model.name} | {model.expert_bytes / 1e6:.0f} MB | {copied:.0f} | {stated:.0f} | {window} | "
                f"{_spread(eager[window])} | {_spread(graphed[window])} | {'yes' if low <= LIMIT_US else 'no'} |"
            )
    return good


def print_training(runs: dict[str, Path], device: torch.device, budget_gb: float, steps: int) -> bool:
    """Prints the table of training; returns whether all stayed within the budget."""
    print(f"| traces | precision | tokens a step | tokens/s | peak GB of {budget_gb:g} |")
    print("|---|---|---|---|---|")
    good = True
    for name, run in runs.items():
        view = TrainingView(TraceDataset(run))
        for precision in ("bfloat16", "float32"):
            for batch_tokens in (BATCH_TOKENS, LARGE_STEP):
                predictor = InterLayer().to(device)
                rate, peak = training_rate(predictor, view, precision, budget_gb, batch_tokens, steps)
                good &= peak <= budget_gb
                print(f"| {name} | {precision} | {batch_tokens} | {rate:.0f} | {peak:.2f} |")
    return good


def untrained(shape: RoutingShape, device: torch.device, **options: Any) -> InterLayer:
    """A predictor with random weights, which takes as long as a trained one."""
    predictor = InterLayer(**options)
    predictor.shape_ = shape
    predictor.module_ = predictor.build(shape, torch.Generator().manual_seed(0))
    return predictor.to(device)


def live_us(predictor: InterLayer, tokens: int, graphs: bool) -> dict[str, list[float]]:
    """Microseconds from each choice to the scores one layer on, of `tokens` tokens with the window empty, then full."""
    assert predictor.shape_ is not None
    shape = predictor.shape_
    state = InterLayerLive(shape, predictor.network.eval(), graphs)
    started = time.perf_counter()
    predictor.predict_next(state)
    log(f"{shape}: lane made in {time.perf_counter() - started:.2f} s, graphs {state.graphs}")
    generator = torch.Generator().manual_seed(0)

    def decode(count: int, ask: bool) -> list[float]:
        found = []
        for _ in range(count):
            state.begin_token()
            draw_LE = torch.rand(shape.num_layers, shape.num_experts, generator=generator)
            weights_LK, ids_LK = draw_LE.topk(shape.top_k)
            for ids_K, weights_K in zip(ids_LK, weights_LK, strict=True):
                chosen = time.perf_counter()
                state.observe(ids_K, weights_K)
                if ask:
                    predictor.predict_next(state)
                    found.append((time.perf_counter() - chosen) * 1e6)
        return found

    decode(WARM_UP_TOKENS, ask=True)
    empty = decode(tokens, ask=True)
    decode(predictor.settings.window, ask=False)
    decode(WARM_UP_TOKENS, ask=True)
    return {"empty": empty, "full": decode(tokens, ask=True)}


def transfer_us(device: torch.device, size: int) -> float:
    """The median time, in microseconds, in which so many bytes come from (on a GPU, pinned) host memory."""
    on_gpu = device.type == "cuda"
    source = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    found = []
    for _ in range(TRANSFERS):
        wait()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait()
        found.append((time.perf_counter() - started) * 1e6)
    return float(np.median(found))


def training_rate(
    predictor: InterLayer, view: TrainingView, precision: str, budget_gb: float, batch_tokens: int, steps: int
) -> tuple[float, float]:
    """Tokens per second after the first steps, and the peak memory of the device in GB."""
    if predictor.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(predictor.device)
    settings = LoopSettings(
        precision=precision, memory_budget_gb=budget_gb, batch_tokens=batch_tokens, max_steps=steps, patience=steps
    )
    marks: list[tuple[float, int]] = []  # seconds and tokens

    def record(line: dict[str, Any]) -> None:
        if "validation_recall" not in line:
            marks.append((time.perf_counter(), line["tokens"]))

    fit_module(predictor, view, settings, record=record)
    if len(marks) < 2:
        raise click.BadParameter(f"{steps}; at least {2 * RECORDED_STEPS} are needed to time any", param_hint="--steps")
    (first, tokens_then), (last, tokens) = marks[0], marks[-1]
    peaks = peaks_gb(predictor.device)
    return (tokens - tokens_then) / (last - first), peaks.get("peak_device_memory_gb", peaks["peak_host_memory_gb"])


def random_traces(folder: Path, shape: RoutingShape, sequences: int = SEQUENCES) -> Path:
    """A run folder of random routing with weights, one shard."""
    layers = shape.num_layers
    spec = replace(
        make_spec(),
        num_layers=layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        moe_layers=tuple(range(layers)),
        store=("weights",),
        horizons=0,
    )
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with lock_run(folder), ShardWriter(folder, spec, PlannedShard(0, 0, sequences, sequences * LENGTH)) as writer:
        for number in range(sequences):
            drawn = draw_sequence(spec, number, generator)
            writer.write(replace(drawn, router_logits_TLE=None, lookahead_logits_THLE=None))
        writer.commit()
    return folder


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.0f} ({np.percentile(values, 95):.0f})"


if __name__ == "__main__":
    main()
