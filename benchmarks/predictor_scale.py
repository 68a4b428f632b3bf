"""How long do counting a million tokens into `statistics`, and scoring a million tokens, take on a CPU?

    .venv/bin/python benchmarks/predictor_scale.py [--tokens 1000000] [--threads 2]

Writes synthetic routing of gpt-oss-20b's shape with weights (benchmarks/report.py's), fits `statistics` on the train
split of it, and evaluates that one and the shipped `interlayer` of gpt-oss-20b on every sequence, one layer ahead, with
all baselines and intervals. Accuracy on synthetic routing means nothing and is not printed. Beside the seconds stands
their ratio to reading the same sequences and columns from the shards in the same run.
"""

import tempfile
import time
from pathlib import Path

import click
import torch
from report import make_spec, write_folder

from groundwork.hardware import peak_memory_bytes
from groundwork.progress import log
from speculation import evaluate, load_predictor
from speculation.training.trainer import TrainSettings, train
from traces.reader import TraceDataset

LAYERS, EXPERTS, TOP_K = 24, 32, 4
SHIPPED = Path(__file__).parents[1] / "models" / "gpt-oss-20b-interlayer"


def seconds_to_read(dataset: TraceDataset, split: str) -> float:
    """Of one pass over a split with weights and tokens."""
    started = time.perf_counter()
    for _ in dataset.sequences(split, ("weights", "tokens")):
        pass
    return time.perf_counter() - started


@click.command()
@click.option("--tokens", default=1_000_000, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(tokens: int, threads: int) -> None:
    """Print one Markdown table."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        run, folder = Path(temporary) / "run", Path(temporary) / "statistics"
        log(f"writing {tokens:,} tokens")
        written = write_folder(run, make_spec(LAYERS, EXPERTS, TOP_K), tokens)
        dataset = TraceDataset(run)
        train_tokens = sum(int(dataset.index.num_tokens_S[part].sum()) for part in dataset.order("train"))
        print("| what | tokens | seconds | times reading | seconds per million tokens |\n|---|---|---|---|---|")

        def row(what: str, scored: int, started: float, reading: float) -> None:
            seconds = time.perf_counter() - started
            print(
                f"| {what} | {scored:,} | {seconds:.0f} | {seconds / reading:.0f} | {1e6 * seconds / scored:.0f} |",
                flush=True,
            )

        reading = seconds_to_read(dataset, "train")
        started = time.perf_counter()
        train(TrainSettings(shard_dir=run, predictor="statistics", output_dir=folder))
        row("train `statistics`", train_tokens, started, reading)
        reading = seconds_to_read(dataset, "all")
        for name, path in (("statistics", folder), ("interlayer", SHIPPED)):
            started = time.perf_counter()
            evaluate(dataset, {name: load_predictor(path)}, split="all")
            row(f"evaluate `{name}`", written, started, reading)
        print(f"\n{threads} threads; peak memory {peak_memory_bytes(torch.device('cpu')) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
