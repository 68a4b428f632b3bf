"""The section of calibration: its figures are those of the evaluation, and resolution is Murphy's."""

import copy
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from analysis.sections import calibration
from speculation.calibration import ReliabilityTally
from speculation.features import RoutingBatch
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset

NAME = "markov@<b>mine"


@pytest.fixture(scope="module")
def calibrated(evaluation: dict[str, Any], dataset: TraceDataset) -> dict[str, Any]:
    """The evaluation with a predictor that is too sure of itself by design, and one that is not sure at all."""
    batch = RoutingBatch.from_sequences(list(dataset.sequences()), dataset.spec)
    shape = RoutingShape.of(dataset)
    tallies = {name: ReliabilityTally() for name in ("bold", "even")}
    generator = torch.Generator().manual_seed(0)
    size = (batch.num_tokens, shape.num_layers, shape.num_experts)
    chosen_TLE = torch.zeros(size).scatter_(2, batch.expert_ids_TLK.long(), 1.0)
    guessed_TLE = torch.where(torch.rand(size, generator=generator) < 0.3, 1 - chosen_TLE, chosen_TLE)
    tallies["bold"].add(0.05 + 0.9 * guessed_TLE, batch)
    tallies["even"].add(torch.full(size, shape.top_k / shape.num_experts), batch)
    changed = copy.deepcopy(evaluation)
    changed["predictors"] = {
        name: changed["predictors"][NAME] | {"calibration": tally.result(resamples=20)}
        for name, tally in tallies.items()
    } | changed["predictors"]
    return changed


def test_the_diagram_and_the_errors_are_the_evaluations(calibrated: dict[str, Any]) -> None:
    section = calibration.make([calibrated])
    reliability, error = section.figures
    for figure in section.figures:
        go.Figure(figure.spec)
    bins = calibrated["predictors"]["bold"]["calibration"]["by_probability"]
    assert [row[1:] for row in reliability.rows if row[0] == "bold"] == [
        [each["count"], round(100 * each["predicted"], 2), round(100 * each["observed"], 2)] for each in bins
    ]
    assert "bold says 95.0 %" in reliability.sentence
    rows = {row[0]: row for row in error.rows}
    assert list(rows) == ["bold", "even"]
    found = calibrated["predictors"]["bold"]["calibration"]["expected_calibration_error"]
    assert rows["bold"][2:5] == [round(100 * found[end], 2) for end in ("value", "low", "high")]
    assert rows["even"][2] == pytest.approx(0, abs=0.01)
    assert rows["even"][5] == 0 < rows["bold"][5]
    assert "least is 0.00 points, of even" in error.sentence


def test_several_horizons_have_an_error_each(calibrated: dict[str, Any]) -> None:
    _, error = calibration.make([calibrated, calibrated | {"horizon": 2}]).figures
    assert [row[:2] for row in error.rows] == [["bold", 1], ["even", 1], ["bold", 2], ["even", 2]]


def test_resolution_is_the_share_of_variance_between_tenths() -> None:
    counts, observed = np.array([60.0, 30.0, 10.0]), np.array([0.1, 0.3, 0.9])
    ones = np.rint(counts * observed).astype(int)
    outcomes = np.repeat(np.tile([1.0, 0.0], 3), np.stack([ones, counts.astype(int) - ones], axis=1).ravel())
    between = np.repeat(observed, counts.astype(int))
    bins = [{"count": c, "predicted": 0.0, "observed": o} for c, o in zip(counts, observed, strict=True)]
    assert calibration.resolved_share({"by_probability": bins}) == pytest.approx(between.var() / outcomes.var())
    assert calibration.resolved_share({"by_probability": [{"count": 5, "predicted": 1.0, "observed": 1.0}]}) == 0


def test_where_no_predictor_gives_probabilities_the_section_says_how_to_get_them(evaluation: dict[str, Any]) -> None:
    section = calibration.make([evaluation])
    assert not section.figures
    assert "validation_fit" in section.notices[0].text
