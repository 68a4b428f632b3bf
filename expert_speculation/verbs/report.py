"""`report`: one self-contained HTML file."""

import json
from pathlib import Path

import click

from expert_speculation.options import (
    PATH,
    json_option,
    predictor_dirs_option,
    seed_option,
    shard_dir_option,
    write_results,
)


@click.command()
@shard_dir_option
@predictor_dirs_option
@click.option(
    "--evaluation", "evaluation_file", type=PATH, help="What `evaluate --json` wrote; made anew when not given."
)
@click.option("--output", type=PATH, required=True, help="HTML file to write.")
@click.option("--journeys", type=int, default=24, help="Sequences whose tokens can be followed.")
@seed_option
@json_option
def report(
    shard_dir: Path,
    predictor_dirs: tuple[Path, ...],
    evaluation_file: Path | None,
    output: Path,
    journeys: int,
    seed: int,
    json_file: Path | None,
) -> None:
    """Write one HTML file: usage, transitions, accuracy with intervals, token journeys."""
    from analysis.report import write_report
    from groundwork.errors import ConfigurationError
    from speculation.evaluation import evaluate
    from speculation.predictor import load_predictors
    from traces.reader import TraceDataset

    dataset = TraceDataset(shard_dir)
    predictors = load_predictors(predictor_dirs)
    evaluation = None
    if evaluation_file is not None:
        try:
            evaluation = json.loads(evaluation_file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"--evaluation {evaluation_file}: {error}; write it with 'expert-speculation evaluate --json'"
            ) from None
    elif predictors:
        evaluation = evaluate(dataset, predictors, seed=seed)
    numbers = write_report(dataset, predictors, output, evaluation=evaluation, journeys=journeys, seed=seed)
    click.echo(output)
    write_results(json_file, numbers)
