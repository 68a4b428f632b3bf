"""How does the error fall with more training data, with longer context, and with more parameters?

    .venv/bin/python benchmarks/learning_curve.py --shard_dir RUN --output_dir DIR [--predictor interlayer] [--epochs 6]
        [--share 0.125 --share 0.25 ...] [--option NAME=VALUE] [--split validation]

Trains on nested parts of the train split, each as many steps as the epochs give it, and scores all on the same split.
A power law, recall = limit - a * tokens ** -b, is fitted to the curve: its limit is what the same design would reach on
endless data of the same kind, an extrapolation and no promise. By position shows what context is worth: recall by how
many tokens stand before, of the predictor trained on everything. Trained predictors stay in `--output_dir`, and a
second call goes on where the first was ended.
"""

import json
from pathlib import Path

import click
import numpy as np
from scipy.optimize import curve_fit

from groundwork.atomic import write_json
from speculation import evaluate, load_predictor
from speculation.predictor import CONFIG_FILE
from speculation.training.trainer import TrainSettings, train
from traces.reader import TraceDataset


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), required=True)
@click.option("--output_dir", type=click.Path(path_type=Path), required=True)
@click.option("--predictor", default="interlayer", show_default=True)
@click.option(
    "--share", "shares", type=float, multiple=True, default=(0.0625, 0.125, 0.25, 0.5, 1.0), show_default=True
)
@click.option("--epochs", default=6, show_default=True)
@click.option("--option", "pairs", multiple=True, help="NAME=VALUE in JSON for the predictor's constructor.")
@click.option("--split", default="validation", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    shard_dir: Path,
    output_dir: Path,
    predictor: str,
    shares: tuple[float, ...],
    epochs: int,
    pairs: tuple[str, ...],
    split: str,
    seed: int,
    json_file: Path | None,
) -> None:
    """Print recall by training tokens and by position."""
    dataset = TraceDataset(shard_dir)
    options = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
    whole = sum(info.num_tokens for info in dataset.index if info.split == "train")
    rows = []
    for share in sorted(shares):
        folder = output_dir / f"{predictor}-{share:g}"
        if not (folder / CONFIG_FILE).exists():
            train(
                TrainSettings(
                    shard_dir,
                    predictor,
                    folder,
                    epochs=epochs,
                    train_tokens=None if share >= 1 else max(1, round(share * whole)),
                    options=options,
                    seed=seed,
                    resume=True,
                )
            )
        trained = load_predictor(folder)
        found = evaluate(dataset, {predictor: trained}, split=split, seed=seed)["predictors"][predictor]
        rows.append({"train_tokens": trained.provenance_["train_tokens"], **found})
    top_k, wide = str(dataset.spec.top_k), str(2 * dataset.spec.top_k)
    click.echo(
        f"{predictor}, {epochs} epochs, recall on {split}\n\n| training tokens | @{top_k} | @{wide} |\n|---|---|---|"
    )
    for row in rows:
        click.echo(f"| {row['train_tokens']:,} | {spoken(row['recall'][top_k])} | {spoken(row['recall'][wide])} |")
    limit = fitted_limit([row["train_tokens"] for row in rows], [row["recall"][top_k]["value"] for row in rows])
    if limit is not None:
        click.echo(
            f"\npower law: recall@{top_k} of {limit['limit']:.3f} on endless data, exponent {limit['exponent']:.2f}"
        )
    click.echo(f"\n| tokens before | tokens scored | @{top_k} |\n|---|---|---|")
    for each in rows[-1]["by_position"]:
        place = str(each["first"]) if each["first"] == each["last"] else f"{each['first']} to {each['last'] or 'end'}"
        click.echo(f"| {place} | {each['tokens']:,} | {spoken(each[f'recall@{top_k}'])} |")
    if json_file:
        write_json(json_file, {"predictor": predictor, "epochs": epochs, "split": split, "limit": limit, "rows": rows})


def spoken(each: dict[str, float]) -> str:
    """Return a value with its interval."""
    return f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"


def fitted_limit(tokens: list[int], recalls: list[float]) -> dict[str, float] | None:
    """Return limit and exponent of the power law through the points; None for fewer than four or where none fits."""
    if len(tokens) < 4:
        return None
    relative = np.array(tokens) / tokens[-1]
    try:
        (limit, _, exponent), _ = curve_fit(
            lambda x, limit, a, b: limit - a * x**-b,
            relative,
            np.array(recalls),
            p0=(min(1.0, recalls[-1] + 0.02), 0.02, 0.5),
            bounds=([recalls[-1], 0, 0.05], [1.0, 1.0, 3.0]),
        )
    except RuntimeError:
        return None
    return {"limit": float(limit), "exponent": float(exponent)}


if __name__ == "__main__":
    main()
