"""How much does a random split of windows flatter, as many published figures use it, beside a split by sequence?

    .venv/bin/python benchmarks/split_gap.py --shard_dir RUN [--window 32] [--predictor markov ...] [--epochs 4]

Every sequence is cut into windows of `--window` tokens that start afresh. The same windows are split in two ways: each
by itself, so that windows of one text stand on both sides, and by the text they come from. Training, windows and
settings are equal; what differs is who is scored. Printed is recall at K, one layer ahead, with 95 % intervals from a
bootstrap over the windows (first way) and the difference. Neural predictors end by epochs, not by validation.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from groundwork.atomic import write_json
from speculation import create, evaluate
from speculation.neural import NeuralPredictor
from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace
from traces.splits import ELEMENTARY_SPLITS
from traces.writer import ShardWriter


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), required=True)
@click.option("--window", default=32, show_default=True, help="Tokens of a window.")
@click.option("--predictor", "names", multiple=True, default=("markov", "statistics", "interlayer"), show_default=True)
@click.option("--epochs", default=4, show_default=True, help="Of neural predictors.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(shard_dir: Path, window: int, names: tuple[str, ...], epochs: int, seed: int, json_file: Path | None) -> None:
    """Print recall at K under both splits."""
    source = TraceDataset(shard_dir)
    with tempfile.TemporaryDirectory() as folder:
        parents = write_windows(source, Path(folder), window)
        by_window, by_sequence = TraceDataset(folder), TraceDataset(folder)
        by_sequence.index.split_S = parents
        top_k = str(source.spec.top_k)
        rows = []
        for name in names:
            found = []
            for dataset in (by_window, by_sequence):
                predictor = create(name)
                limits = {"epochs": epochs, "patience": 1000, "seed": seed}
                predictor.fit(dataset, **(limits if isinstance(predictor, NeuralPredictor) else {}))
                found.append(evaluate(dataset, {name: predictor}, seed=seed)["predictors"][name]["recall"][top_k])
            rows.append({"predictor": name, "by_window": found[0], "by_sequence": found[1]})
    click.echo(f"{len(parents):,} windows of at most {window} tokens; recall@{top_k} on the test split\n")
    click.echo("| predictor | windows split at random | split by sequence | flattery |\n|---|---|---|---|")
    for row in rows:
        cells = [f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in list(row.values())[1:]]
        gap = row["by_window"]["value"] - row["by_sequence"]["value"]
        click.echo(f"| {row['predictor']} | {cells[0]} | {cells[1]} | {gap:+.3f} |")
    if json_file:
        write_json(json_file, {"shard_dir": shard_dir.name, "window": window, "epochs": epochs, "rows": rows})


def write_windows(source: TraceDataset, folder: Path, window: int) -> np.ndarray:
    """Write the windows of `source` as sequences of their own; return the split of the text each comes from, (S,)."""
    windows, splits = [], []
    for sequence, info in zip(source.sequences(columns=(*source.spec.store, "tokens")), source.index, strict=True):
        for piece in cut(sequence, window):
            windows.append(replace(piece, sequence_id=len(windows)))
            splits.append(ELEMENTARY_SPLITS.index(info.split))
    planned = PlannedShard(0, 0, len(windows), sum(piece.num_tokens for piece in windows))
    with ShardWriter(folder, source.spec, planned) as writer:
        for piece in windows:
            writer.write(piece)
        writer.commit()
    return np.array(splits, dtype=np.int8)


def cut(sequence: SequenceTrace, window: int) -> Iterator[SequenceTrace]:
    """Yield the windows of one sequence."""
    per_token = [name for name, value in vars(sequence).items() if name.endswith(("_T", "_TLK", "_TLE", "_THLE"))]
    for start in range(0, sequence.num_tokens, window):
        columns = {name: getattr(sequence, name) for name in per_token}
        yield replace(
            sequence,
            **{name: None if each is None else each[start : start + window] for name, each in columns.items()},
        )


if __name__ == "__main__":
    main()
