"""docs/REPORT.md explains every figure that a report can hold."""

import re
from pathlib import Path
from typing import Any

from analysis.report import write_report
from traces.reader import TraceDataset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "REPORT.md"


def test_every_figure_is_explained_and_nothing_else(
    dataset: TraceDataset, evaluation: dict[str, Any], simulation: dict[str, Any], tmp_path: Path
) -> None:
    name = "markov@<b>mine"
    bins = [{"count": 9, "predicted": 0.2, "observed": 0.3}]
    error = {"value": 0.1, "low": 0.0, "high": 0.2}
    calibration = {"expected_calibration_error": error, "bins": bins, "by_probability": bins}
    evaluation = evaluation | {"predictors": {name: evaluation["predictors"][name] | {"calibration": calibration}}}
    numbers = write_report(
        dataset,
        {},
        tmp_path / "report.html",
        evaluation=[evaluation, evaluation | {"horizon": 2}],
        simulations=[simulation, simulation],
        compared_with=dataset,
        journeys=1,
    )
    keys = set(numbers["figures"])
    assert {"usage", "accuracy_by_horizon", "reliability", "prefetching_machines", "comparison_weights"} <= keys
    text = PAGE.read_text()
    explained = set(re.findall(r"`([a-z_]+)`", text))
    assert keys <= explained
    assert set(numbers) <= explained
    figures = {
        each
        for each in explained
        if re.match("accuracy_|comparison_|calibration_|prefetching_|hit_|focus|token_class", each)
    }
    assert figures <= keys
