"""Which part of InterLayer is worth what? Trains it with one change at a time and scores validation.

    .venv/bin/python benchmarks/ablation.py --shard_dir RUN --epochs 2 --output ablation.json [--only NAME ...]

Every row trains the default with one option changed, on the same steps in the same order, and scores the sequences of
both validation halves (never test), which also chose the weights: rows compare with each other, and flatter a little.
Rows found in the output file are not trained again, so a stopped run goes on and new rows can be added. Differences
below the spread of the rows `seed 1` and `seed 2` mean nothing.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.progress import log
from speculation import RoutingBatch, create
from speculation.counted import count_routing
from speculation.features import packed_batches
from speculation.metrics import metric_names, token_values
from speculation.neural import NeuralPredictor
from speculation.predictor import OPTIONAL_COLUMNS, RoutingShape
from speculation.training.loop import LoopSettings, fit_module
from speculation.training.view import TrainingView
from traces.reader import TraceDataset

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "horizon 1 only": {"first_horizon_share": 1.0},
    "without weights": {"weights": False},
    "with tokens": {"tokens": True},
    "no copy attention": {"copy_heads": 0},
    "copy heads 1": {"copy_heads": 1},
    "copy heads 2": {"copy_heads": 2},
    "copy heads 8, keys of 16": {"copy_heads": 8, "copy_key_size": 16},
    "keys of 16": {"copy_key_size": 16},
    "keys of 64": {"copy_key_size": 64},
    "no context of tokens": {"context_size": 0},
    "no copy attention, no context": {"copy_heads": 0, "context_size": 0},
    "context of 256": {"context_size": 256},
    "context of 1 block": {"context_blocks": 1},
    "context of 4 blocks": {"context_blocks": 4},
    "reach 3": {"reach": 3},
    "reach 6": {"reach": 6},
    "reach 12": {"reach": 12},
    "no path summary": {"path_size": 0},
    "path summary of 128": {"path_size": 128},
    "reach 6, no path summary": {"reach": 6, "path_size": 0},
    "reach 12, no path summary": {"reach": 12, "path_size": 0},
    "one decay": {"decays": [0.9]},
    "six decays": {"decays": [0.3, 0.6, 0.8, 0.9, 0.97, 0.995]},
    "window of 128 tokens": {"window": 128},
    "hidden 64": {"hidden_size": 64},
    "hidden 192": {"hidden_size": 192},
    "MLP 64": {"mlp_size": 64},
    "MLP 256": {"mlp_size": 256},
    "no dropout": {"dropout": 0.0},
    "dropout 0.05": {"dropout": 0.05},
    "dropout 0.3": {"dropout": 0.3},
    "no weight dropout": {"weight_dropout": 0.0},
    "weight dropout 0.6": {"weight_dropout": 0.6},
    "no loss of order": {"order_share": 0.0},
    "loss of order 0.3": {"order_share": 0.3},
    "loss of order 1": {"order_share": 1.0},
    "loss set": {"loss": "set"},
    "loss pairwise": {"loss": "pairwise"},
    "loss ranks": {"loss": "ranks", "order_share": 0.0},
    "loss weighted": {"loss": "weighted", "order_share": 0.0},
}
LOOP_OPTIONS = {"seed", "learning_rate", "batch_tokens", "ema"}
HEADER = "| row | recall@{k} | recall@{wide} | top-1 | hit@1 | exact set | recall@{k}, ids alone | parameters | CPU s |"


def train_row(dataset: TraceDataset, changes: dict[str, Any], limits: dict[str, Any]) -> tuple[NeuralPredictor, float]:
    """A trained predictor, and the processor seconds it took."""
    loop = {name: value for name, value in changes.items() if name in LOOP_OPTIONS}
    predictor = create("interlayer", **{name: value for name, value in changes.items() if name not in LOOP_OPTIONS})
    assert isinstance(predictor, NeuralPredictor)
    started = time.process_time()
    fit_module(predictor, TrainingView(dataset), LoopSettings(**{**limits, **loop}), counts=count_routing(dataset))
    return predictor, time.process_time() - started


def score_row(dataset: TraceDataset, predictor: NeuralPredictor, *, weights: bool = True) -> dict[str, float]:
    """Micro-averages over the layers with one below, by metric."""
    shape = RoutingShape.of(dataset)
    names = metric_names(shape, dataset.spec.expert_order == "weight")
    columns = sorted(frozenset(predictor.sees(dataset.available)) & OPTIONAL_COLUMNS)
    totals, tokens = torch.zeros(len(names), dtype=torch.float64), 0
    for split in ("validation_stop", "validation_fit"):
        batch: RoutingBatch
        for _, batch in packed_batches(dataset.sequences(split, columns), dataset.spec, 2048):
            seen = batch if weights else replace(batch, routing_weights_TLK=None)
            totals += token_values(predictor.predict_scores(seen), batch, names)[:, 1:].mean(dim=1).sum(dim=0)
            tokens += batch.num_tokens
    return dict(zip(names, (totals / tokens).tolist(), strict=True))


def table_line(row: dict[str, Any], top_k: int) -> str:
    """A row of the Markdown table."""
    score = row["validation"]
    wide = max(int(name.removeprefix("recall@")) for name in score if name.startswith("recall@"))
    cells = [score[f"recall@{top_k}"], score[f"recall@{wide}"], score.get("top_1"), score["hit_at_1"]]
    cells += [score["exact_set"], (row["ids_alone"] or {}).get(f"recall@{top_k}")]
    figures = " | ".join("" if cell is None else f"{cell:.4f}" for cell in cells)
    return f"| {row['name']} | {figures} | {row['parameters'] / 1e6:.2f} M | {row['seconds']:.0f} |"


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), required=True)
@click.option("--epochs", type=int, default=2, show_default=True)
@click.option("--only", multiple=True, help="Train these rows only; repeat for several.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON; rows in it are kept.")
def main(shard_dir: Path, epochs: int, only: tuple[str, ...], seed: int, output: Path) -> None:
    """Prints one Markdown table."""
    unknown = [name for name in only if name not in ROWS]
    if unknown:
        raise click.UsageError(f"--only {unknown[0]}: unknown; choose of {'; '.join(ROWS)}")
    dataset = TraceDataset(shard_dir)
    torch.set_num_threads(1)
    identity = {"plan_fingerprint": dataset.spec.plan_fingerprint, "epochs": epochs, "seed": seed}
    result: dict[str, Any] = {**identity, "rows": {}}
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
        if {name: result[name] for name in identity} != identity:
            raise click.UsageError(f"{output}: rows of another run, number of epochs or seed; give another file")
    for name in only or ROWS:
        options = ROWS[name]
        if name in result["rows"]:
            continue
        try:
            predictor, seconds = train_row(dataset, options, {"epochs": epochs, "seed": seed, "patience": 1000})
        except ConfigurationError as error:
            log(f"{name}: left out ({error})")
            continue
        sees_weights = "weights" in predictor.uses
        row = {
            "name": name,
            "options": options,
            "parameters": sum(tensor.numel() for tensor in predictor.state().values()),
            "seconds": seconds,
            "validation": score_row(dataset, predictor),
            "ids_alone": score_row(dataset, predictor, weights=False) if sees_weights else None,
        }
        result["rows"][name] = row
        atomic.write_json(output, result)
        log(table_line(row, dataset.spec.top_k))
    top_k, wide = dataset.spec.top_k, min(2 * dataset.spec.top_k, dataset.spec.num_experts)
    print(HEADER.format(k=top_k, wide=wide))
    print("|---|" + "---|" * 8)
    for row in result["rows"].values():
        print(table_line(row, top_k))


if __name__ == "__main__":
    main()
