"""Which idea predicts best on the same routing, and at what price? Trains every predictor alike and prints one table.

    .venv/bin/python benchmarks/peers.py --shard_dir RUN --work_dir DIR [--epochs 6] [--only NAME ...]
        [--predictor_dir FOLDER ...] [--split validation] [--horizon 1] [--json FILE]

Every predictor learns from the same train split; the networks get the same number of epochs in steps of the same size,
on one processor core, with the same rule for keeping their best weights. Each is written to its folder in the work
folder, and one found there is not trained again, so a stopped run goes on. Folders trained elsewhere (another size, an
ensemble) join with --predictor_dir. Scored is `validation` unless told otherwise: its first half chose when training
stopped, so it flatters the networks a little; ask for `test` once, at the end. Predictors that need a column which the
traces lack are left out, and said so. Best first; intervals are 95 % from a bootstrap over sequences.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.progress import log
from speculation import PREDICTORS, Predictor, RoutingBatch, evaluate, load_predictors
from speculation.predictor import MODEL_FILE, OPTIONAL_COLUMNS
from speculation.training.trainer import TrainSettings, train
from traces.reader import TraceDataset

# What one training gives; an ensemble is made of others and joins with --predictor_dir.
TRAINED = [name for name in PREDICTORS if name != "ensemble"]
RECORD_FILE = "trainings.json"
HEADER = (
    "| predictor | sees | recall@{k} [95 %] | recall@{wide} | hit@1 | exact set | better than the next | parameters "
    "| MiB | CPU s |"
)


def train_missing(names: list[str], settings: dict[str, Any], work_dir: Path) -> tuple[list[Path], dict[str, float]]:
    """The folders of the predictors that these traces can train, trained where they are not there yet.

    Beside them the processor seconds each took. Raises click.UsageError where the work folder holds other trainings.
    """
    fingerprint = TraceDataset(settings["shard_dir"]).spec.plan_fingerprint
    identity = {"plan_fingerprint": fingerprint, "epochs": settings["epochs"], "seed": settings["seed"]}
    path = work_dir / RECORD_FILE
    record = {"identity": identity, "seconds": {}}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    if record["identity"] != identity:
        raise click.UsageError(f"{work_dir}: trained on other traces or with other limits; give another --work_dir")
    seconds: dict[str, float] = record["seconds"]
    folders = []
    for name in names:
        started = time.process_time()
        try:
            folders.append(train(TrainSettings(predictor=name, output_dir=work_dir / name, **settings)))
        except ConfigurationError as error:
            log(f"{name}: left out ({error})")
            continue
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - started
            atomic.write_json(path, record)
    return folders, seconds


def able_to_score(dataset: TraceDataset, predictors: dict[str, Predictor], horizon: int) -> dict[str, Predictor]:
    """Those that find all they need for this horizon in the traces; the others are named in the log."""
    able = {}
    for name, predictor in predictors.items():
        try:
            predictor.check_columns(dataset, name)
            columns = sorted(frozenset(predictor.sees(dataset.available)) & OPTIONAL_COLUMNS)
            first = next(dataset.sequences("all", columns))
            predictor.predict_scores(RoutingBatch.from_sequences([first], dataset.spec), horizon)
            able[name] = predictor
        except ConfigurationError as error:
            log(f"{name}: not scored ({error})")
    return able


def table(result: dict[str, Any], sizes: dict[str, tuple[int, int]], seconds: dict[str, float]) -> str:
    """The evaluation as Markdown, best recall at K first."""
    top_k = str(result["top_k"])
    wide = max(result["predictors"]["chance"]["recall"], key=int)
    ranked = sorted(result["predictors"], key=lambda name: -result["predictors"][name]["recall"][top_k]["value"])
    differences = {(each["a"], each["b"]): each for each in result["differences"]}
    lines = [HEADER.format(k=top_k, wide=wide), "|---|---|" + "---:|" * 8]
    for name, following in zip(ranked, [*ranked[1:], None], strict=True):
        figures = result["predictors"][name]
        recall = figures["recall"][top_k]
        lead = differences.get((name, following)) if following else None
        cells = [
            f"`{name}`",
            ", ".join(figures["sees"]),
            f"{recall['value']:.4f} [{recall['low']:.4f}, {recall['high']:.4f}]",
            f"{figures['recall'][wide]['value']:.4f}",
            f"{figures['hit_at_1']['value']:.4f}",
            f"{figures['exact_set']['value']:.4f}",
            f"{lead['value']:+.4f} [{lead['low']:+.4f}, {lead['high']:+.4f}]" if lead else "",
        ]
        parameters, size = sizes.get(name, (0, 0))
        cells += [f"{parameters / 1e6:.2f} M", f"{size / 2**20:.1f}"] if name in sizes else ["", ""]
        cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), required=True)
@click.option("--work_dir", type=click.Path(path_type=Path), required=True, help="One folder per predictor goes here.")
@click.option("--epochs", type=int, default=6, show_default=True, help="Of the networks.")
@click.option("--only", multiple=True, help="Train and score these only; repeat for several.")
@click.option("--predictor_dir", type=click.Path(path_type=Path), multiple=True, help="Trained elsewhere; repeatable.")
@click.option("--split", default="validation", show_default=True)
@click.option("--horizon", type=int, default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="The whole evaluation goes here.")
def main(
    shard_dir: Path,
    work_dir: Path,
    epochs: int,
    only: tuple[str, ...],
    predictor_dir: tuple[Path, ...],
    split: str,
    horizon: int,
    seed: int,
    json_file: Path | None,
) -> None:
    """Print one Markdown table."""
    unknown = [name for name in only if name not in TRAINED]
    if unknown:
        raise click.UsageError(f"--only {unknown[0]}: unknown; choose of {', '.join(TRAINED)}")
    torch.set_num_threads(1)
    limits = {"shard_dir": shard_dir, "epochs": epochs, "seed": seed, "device": "cpu", "resume": True}
    work_dir.mkdir(parents=True, exist_ok=True)
    folders, seconds = train_missing(list(only) or TRAINED, limits, work_dir)
    dataset = TraceDataset(shard_dir)
    able = able_to_score(dataset, load_predictors([*folders, *predictor_dir]), horizon)
    result = evaluate(dataset, able, split=split, horizon=horizon, seed=seed)
    sizes = {}
    for name, predictor in able.items():
        assert predictor.folder_ is not None
        parameters = sum(tensor.numel() for tensor in predictor.state().values())
        sizes[name] = (parameters, (predictor.folder_ / MODEL_FILE).stat().st_size)
    if json_file is not None:
        atomic.write_json(json_file, result)
    click.echo(table(result, sizes, seconds))
    click.echo(
        f"\n{result['sequences']:,} sequences, {result['tokens']:,} tokens of split {split}, {horizon} ahead; "
        f"networks trained for {epochs} epochs"
    )


if __name__ == "__main__":
    main()
