"""`report`: one self-contained HTML file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expert_speculation.options import PATH, json_option, predictor_dirs_option, seed_option, write_results

if TYPE_CHECKING:
    from speculation.predictor import Predictor
    from traces.reader import TraceDataset

FORMATS = ("svg", "png", "pdf")


@click.command()
@click.option(
    "--shard_dir",
    "shard_dirs",
    type=PATH,
    multiple=True,
    required=True,
    help="Trace folder: a run folder or its data/; a second one is compared with the first.",
)
@predictor_dirs_option
@click.option(
    "--evaluation",
    "evaluation_files",
    type=PATH,
    multiple=True,
    help="What `evaluate --json` wrote; made anew when not given. Repeat for several horizons.",
)
@click.option(
    "--horizon",
    "horizons",
    type=int,
    multiple=True,
    help="Layers ahead of the evaluation made here, 1 when not given; repeat for several.",
)
@click.option(
    "--simulation",
    "simulation_files",
    type=PATH,
    multiple=True,
    help="What `simulate --json` wrote, to show what prefetching buys; repeat to compare machines.",
)
@click.option("--output", type=PATH, required=True, help="HTML file to write.")
@click.option(
    "--journeys", type=click.IntRange(min=0), default=24, help="Sequences whose tokens can be followed, up to 512 each."
)
@click.option(
    "--figures",
    "figures_dir",
    type=PATH,
    help="Also write each figure as a file there; needs the extra `figures` and Chromium or Chrome.",
)
@click.option("--figure_format", type=click.Choice(FORMATS), default="svg", help="Of the files of --figures.")
@seed_option
@json_option
def report(
    shard_dirs: tuple[Path, ...],
    predictor_dirs: tuple[Path, ...],
    evaluation_files: tuple[Path, ...],
    horizons: tuple[int, ...],
    simulation_files: tuple[Path, ...],
    output: Path,
    journeys: int,
    figures_dir: Path | None,
    figure_format: str,
    seed: int,
    json_file: Path | None,
) -> None:
    """Write one HTML file: usage, transitions, accuracy with intervals, what prefetching buys, token journeys.

    With two --shard_dir a section compares the runs: usage of the experts, and where the texts are the same, agreement
    of the routed experts. All other sections describe the first run; predictors are scored on it and journeys are its
    own. What each section means, and what it can not say, is in docs/REPORT.md.
    """
    from analysis.images import check_images
    from analysis.report import check_output, write_report
    from groundwork.errors import ConfigurationError
    from speculation.predictor import load_predictors
    from traces.reader import TraceDataset

    if len(shard_dirs) > 2:
        raise ConfigurationError(
            f"--shard_dir: {len(shard_dirs)} folders, wanted one, or two to compare; write a report for each pair"
        )
    if evaluation_files and horizons:
        raise ConfigurationError(
            "--horizon belongs to evaluations made here, --evaluation brings its own; leave one of them out"
        )
    check_output(output)
    if figures_dir is not None:
        check_images(figures_dir)
    runs = [TraceDataset(shard_dir) for shard_dir in shard_dirs]
    predictors = load_predictors(predictor_dirs)
    simulations = [_read("simulation", file, "simulate") for file in simulation_files]
    evaluations = [_read("evaluation", file, "evaluate") for file in evaluation_files] or _made(
        runs[0], predictors, horizons, seed
    )
    numbers = write_report(
        runs[0],
        predictors,
        output,
        evaluation=evaluations,
        evaluation_names=[f"--evaluation {file}" for file in evaluation_files],
        simulations=simulations,
        simulation_names=[f"--simulation {file}" for file in simulation_files],
        compared_with=runs[1] if len(runs) == 2 else None,
        journeys=journeys,
        figures_dir=figures_dir,
        figure_format=figure_format,
        seed=seed,
    )
    click.echo(output)
    write_results(json_file, numbers)


def _read(option: str, file: Path, verb: str) -> Any:
    """Return what a file that the verb wrote holds, whatever it is; raises ConfigurationError where it is not JSON."""
    from groundwork.errors import ConfigurationError

    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--{option} {file}: {error}; write it with 'expert-speculation {verb} --json'"
        ) from None


def _made(
    dataset: "TraceDataset", predictors: "dict[str, Predictor]", horizons: tuple[int, ...], seed: int
) -> list[dict[str, Any]]:
    """Evaluate the predictors at each horizon; without predictors there is nothing to evaluate."""
    from groundwork.errors import ConfigurationError
    from speculation.evaluation import evaluate

    if horizons and not predictors:
        raise ConfigurationError("--horizon: there is no predictor to evaluate; name one with --predictor_dir")
    if not predictors:
        return []
    return [evaluate(dataset, predictors, horizon=horizon, seed=seed) for horizon in dict.fromkeys(horizons or (1,))]
