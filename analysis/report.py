"""The report: one streaming pass over a trace folder, counted, made into sections and written as one HTML file.

Memory is bounded by the counts (which depend on layers, experts and data sets), not by the run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import journeys as token_journeys
from analysis.counts.comparison import compare
from analysis.counts.run_counts import RunCounts
from analysis.evaluations import in_order
from analysis.images import write_images
from analysis.journeys import choose_sequences, make_journeys
from analysis.page import numbers, render
from analysis.sections import (
    accuracy,
    calibration,
    coactivation,
    comparison,
    locality,
    overview,
    prefetching,
    specialisation,
    token_classes,
    transitions,
    usage,
)
from analysis.simulations import checked
from analysis.tokens import readable
from groundwork import atomic
from groundwork.errors import ConfigurationError
from speculation.predictor import Predictor
from traces.reader import TraceDataset

FORMAT_VERSION = 1


def write_report(
    shard_dir: Path | TraceDataset,
    predictors: Mapping[str, Predictor],
    output: Path,
    *,
    evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    evaluation_names: Sequence[str] = (),
    simulations: Sequence[Mapping[str, Any]] = (),
    simulation_names: Sequence[str] = (),
    compared_with: TraceDataset | None = None,
    journeys: int = 24,
    figures_dir: Path | None = None,
    figure_format: str = "svg",
    seed: int = 0,
) -> dict[str, Any]:
    """Write the HTML report of a trace folder to `output` and return every number it shows, ready for JSON.

    `predictors` are asked for their guesses in `journeys` sequences; `evaluation` is the evaluation JSON, or several at
    different horizons, and where it is None the accuracy section says how to get one; `simulations` are what `simulate`
    returned, likewise, the first of them drawn and all of them compared; `evaluation_names` and `simulation_names`, one
    for each, are what errors call them. A second run, `compared_with`, is laid beside this one in a section of its own.
    With `figures_dir` every figure is also written there, as `svg`, `png` or `pdf`. Raises ConfigurationError when the
    folder is no trace or lacks a column that a predictor requires, when an evaluation or simulation is none or one of
    another model, `output` is a folder, or figures can not be drawn, which `images.check_images` tells beforehand.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    dataset = shard_dir if isinstance(shard_dir, TraceDataset) else TraceDataset(shard_dir)
    for name, predictor in predictors.items():
        predictor.check_columns(dataset, name)
        predictor.check_shape(dataset, name)
    spec = dataset.spec
    # before the pass, since these refuse what is no evaluation of this model
    evaluations = in_order(_several(evaluation), spec, evaluation_names)
    for each, name in zip(_several(evaluation), evaluation_names, strict=False):  # so that errors name the one
        accuracy.make([each], name)
        calibration.make([each], name)
    simulated = checked(simulations, spec, simulation_names)
    for each, name in zip(simulated, simulation_names, strict=False):
        prefetching.make([each], name)
    predicted = [accuracy.make(evaluations), *([calibration.make(evaluations)] if evaluations else [])]
    prefetched = prefetching.make(simulated)
    counts = RunCounts(dataset, seed=seed).read(dataset)
    chosen = choose_sequences(dataset.index, journeys, seed)
    horizon = int(evaluations[0]["horizon"]) if evaluations else 1
    travelled = make_journeys(dataset, chosen, predictors, horizon)
    compared = []
    if compared_with is not None:
        compared.append(comparison.make(dataset, compared_with, compare(dataset, compared_with, seed=seed)))
    described = overview.make(dataset, counts.usage, counts.quality)
    sections = [
        described,
        usage.make(counts.usage),
        specialisation.make(counts.usage),
        coactivation.make(counts.coactivation, spec.top_k),
        transitions.make(counts.transitions, counts.layer_information.information(), spec.top_k),
        locality.make(counts.locality, counts.stacks, counts.usage.share_LE()),
        token_classes.make(counts.token_classes),
        *predicted,
        prefetched,
        *compared,
        token_journeys.make(travelled, list(predictors), spec),
    ]
    atomic.write_text(output, render(sections, described.numbers["run"]))
    if figures_dir is not None:
        figures = [figure for section in sections for figure in section.figures]
        write_images(figures, figures_dir, figure_format, readable(spec.model_name))
    return {"format_version": FORMAT_VERSION, **numbers(sections)}


def check_output(output: Path) -> None:
    """Raise ConfigurationError where `output` is a folder."""
    if output.is_dir():
        raise ConfigurationError(
            f"{output}: is a folder, wanted a file to write; name one, such as {output / 'report.html'}"
        )


def _several(evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    """Return one or several evaluations, or none, as a sequence."""
    if evaluation is None:
        return ()
    return (evaluation,) if isinstance(evaluation, Mapping) else evaluation
