"""What does streaming shards cost a training, over training on tensors already in memory? At most 5 % is wanted.

    .venv/bin/python benchmarks/trainer.py --shard_dir RUN [--pairs 9] [--steps 30]

The same steps of the same predictor are taken twice, in turns first: read ahead from the shards as in training, with
the decoding of row groups that falls to each block of steps, and from packed batches held in memory. Printed are the
medians and quartiles over the pairs of the two ratios: of the time a user waits, and of processor seconds, which is
what streaming costs where no other core is free. It exits 1 where the median of the first is above 1.05.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

import click
import torch

from groundwork.ahead import ReadAhead
from groundwork.hardware import choose_device, describe_device
from groundwork.progress import log
from speculation import RoutingBatch, create
from speculation.neural import NeuralPredictor
from speculation.training.epoch import Step
from speculation.training.loop import READ_AHEAD, LoopSettings, Training
from speculation.training.view import TrainingView
from traces.reader import TraceDataset

LIMIT = 1.05


def take(training: Training, steps: list[Step], batches: Iterator[RoutingBatch]) -> None:
    """Takes the steps and waits for the device."""
    for step in steps:
        training.step(step, batches)
    if training.device.type == "cuda":
        torch.cuda.synchronize(training.device)


def timed(training: Training, steps: list[Step], batches: list[RoutingBatch] | None) -> tuple[float, float]:
    """Wall-clock and processor seconds of the steps, streamed where no batches are given."""
    wall, processor = time.perf_counter(), time.process_time()
    if batches is None:
        own = [each for step in steps for each in training.own(step)]
        with ReadAhead(training.first_epoch.read(own, training.columns), READ_AHEAD) as stream:
            take(training, steps, stream)
    else:
        take(training, steps, iter(batches))
    return time.perf_counter() - wall, time.process_time() - processor


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), required=True)
@click.option("--predictor", default="interlayer")
@click.option("--device", default="auto")
@click.option("--pairs", default=9)
@click.option("--steps", "count", default=30)
def main(shard_dir: Path, predictor: str, device: str, pairs: int, count: int) -> None:
    """Prints the two ratios with their quartiles."""
    fitted = create(predictor)
    if not isinstance(fitted, NeuralPredictor):
        raise click.BadParameter(f"{predictor} is not trained in steps", param_hint="--predictor")
    fitted.to(choose_device(device))
    training = Training(fitted, TrainingView(TraceDataset(shard_dir)), LoopSettings(max_steps=10**9))
    plan = training.first_epoch.steps(training.settings.batching(), 0, training.state.micro_batch_tokens)
    steps = [step for _, step in zip(range(count), plan, strict=False)]
    own = [each for step in steps for each in training.own(step)]
    batches = list(training.first_epoch.read(own, training.columns))
    timed(training, steps[:5], batches)  # warms caches up
    waits: list[float] = []
    works: list[float] = []
    for pair in range(pairs):
        order = [None, batches] if pair % 2 else [batches, None]
        first, second = (timed(training, steps, each) for each in order)
        streamed, memory = (first, second) if pair % 2 else (second, first)
        waits.append(streamed[0] / memory[0])
        works.append(streamed[1] / memory[1])
        log(f"pair {pair + 1}: streamed {streamed[0]:.2f} s, in memory {memory[0]:.2f} s, ratio {waits[-1]:.3f}")
    tokens = sum(step.tokens for step in steps)
    print(f"{describe_device(fitted.device)}; {predictor}, {len(steps)} steps of {tokens / len(steps):.0f} tokens")
    for name, ratios in (("time waited", waits), ("processor time", works)):
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        print(f"streamed over in memory, {name}: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {pairs} pairs)")
    sys.exit(quantiles(waits, n=4, method="inclusive")[1] > LIMIT)


if __name__ == "__main__":
    main()
