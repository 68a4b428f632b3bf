"""Does a predictor trained on one kind of text serve another, and what does leaving a whole data set out cost?

    .venv/bin/python benchmarks/transfer.py --shard_dir RUN --output_dir DIR [--predictor statistics] [--epochs 4]
        [--dataset NAME ...]

Trains on each data set alone and on all but each, and scores both on the test split of every data set: rows are what
was trained on, columns what was scored. Intervals are in the JSON. Trained predictors stay in `--output_dir`, and a
second call goes on where the first was ended.
"""

from pathlib import Path
from typing import Any

import click

from groundwork.atomic import write_json
from speculation import evaluate, load_predictor
from speculation.predictor import CONFIG_FILE
from speculation.training.trainer import TrainSettings, train
from traces.reader import TraceDataset


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), required=True)
@click.option("--output_dir", type=click.Path(path_type=Path), required=True)
@click.option("--predictor", default="statistics", show_default=True)
@click.option("--epochs", type=int, help="Of a neural predictor.")
@click.option("--dataset", "names", multiple=True, help="These data sets; all of the run when not given.")
@click.option("--split", default="test", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    shard_dir: Path,
    output_dir: Path,
    predictor: str,
    epochs: int | None,
    names: tuple[str, ...],
    split: str,
    seed: int,
    json_file: Path | None,
) -> None:
    """Print recall at K by data set trained on and data set scored."""
    dataset = TraceDataset(shard_dir)
    chosen = names or tuple(dataset.datasets)
    others = tuple(name for name in dataset.datasets if name not in chosen)
    limits = {f"{name} alone": {"only_dataset": (name,)} for name in chosen}
    limits |= {f"all but {name}": {"hold_out_dataset": (name, *others)} for name in chosen}
    limits["all"] = {"hold_out_dataset": others}
    rows = []
    for number, (label, limit) in enumerate(limits.items()):
        folder = output_dir / f"{predictor}-{number}"
        if not (folder / CONFIG_FILE).exists():
            train(TrainSettings(shard_dir, predictor, folder, epochs=epochs, seed=seed, resume=True, **limit))
        found = evaluate(dataset, {predictor: load_predictor(folder)}, split=split, only=chosen, seed=seed)
        rows.append({"trained_on": label, "scored_on": recalls(found, predictor, str(dataset.spec.top_k))})
    click.echo(f"{predictor}, recall@{dataset.spec.top_k} on {split}\n")
    click.echo("| trained on | " + " | ".join(chosen) + " |\n|" + "---|" * (1 + len(chosen)))
    for row in rows:
        cells = [f"{row['scored_on'][name]['value']:.3f}" if name in row["scored_on"] else "" for name in chosen]
        click.echo(f"| {row['trained_on']} | " + " | ".join(cells) + " |")
    if json_file:
        write_json(json_file, {"predictor": predictor, "split": split, "rows": rows})


def recalls(result: dict[str, Any], predictor: str, top_k: str) -> dict[str, Any]:
    """Return data set -> recall at K with its interval."""
    return {name: each["recall"][top_k] for name, each in result["predictors"][predictor]["by_dataset"].items()}


if __name__ == "__main__":
    main()
