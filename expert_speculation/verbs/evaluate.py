"""`evaluate`: scores predictors on a split."""

from pathlib import Path

import click

from expert_speculation.options import json_option, predictor_dirs_option, seed_option, shard_dir_option, write_results


@click.command()
@shard_dir_option
@predictor_dirs_option
@click.option("--split", default="test", help="train, validation, test or all.")
@click.option("--horizon", type=int, default=1, help="Layers ahead.")
@click.option("--only_dataset", multiple=True, help="Score just the sequences of this data set; repeat for several.")
@seed_option
@json_option
def evaluate(
    shard_dir: Path,
    predictor_dirs: tuple[Path, ...],
    split: str,
    horizon: int,
    only_dataset: tuple[str, ...],
    seed: int,
    json_file: Path | None,
) -> None:
    """Score predictors beside chance, frequency, repeat and markov, with 95 % intervals over sequences."""
    from speculation.evaluation import evaluate as run
    from speculation.evaluation import format_table
    from speculation.predictor import load_predictors
    from traces.reader import TraceDataset

    dataset = TraceDataset(shard_dir)
    predictors = load_predictors(predictor_dirs)
    result = run(dataset, predictors, split=split, horizon=horizon, only=only_dataset, seed=seed)
    click.echo(format_table(result))
    write_results(json_file, result)
