"""What a prediction costs: what the documentation says, or what it takes here."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from prefetch.prediction_time import MEASURED_US, prediction_us
from speculation import Predictor, create
from speculation.counted import Frequency
from speculation.live import LiveState
from traces.reader import TraceDataset

SPEED_TABLE = re.compile(r"^\| `(\w+)` \| (\d+) \| \d+ \| (\d+) \|", re.MULTILINE)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "predictors.md"


class Thoughtful(Frequency):
    """Computes for a millisecond before it answers."""

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        until = time.perf_counter() + 1e-3
        while time.perf_counter() < until:
            pass
        return super().predict_next(state, horizon)


def fitted(dataset: TraceDataset, name: str) -> Any:
    predictor = Thoughtful().fit(dataset)
    predictor.name = name
    return predictor


def test_documented_costs_are_those_of_the_documentation() -> None:
    documented = {name: int(predict) + int(observe) for name, predict, observe in SPEED_TABLE.findall(DOCS.read_text())}
    assert documented == MEASURED_US


def test_a_documented_predictor_costs_what_it_did_there(
    dataset: TraceDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prediction_us(fitted(dataset, "interlayer"), dataset, "test", 1, measure=False) == MEASURED_US["interlayer"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "measure"), [("interlayer", True), ("thoughtful", False)])
def test_others_are_measured_and_the_figure_can_be_given_again(
    name: str, measure: bool, dataset: TraceDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    found = prediction_us(fitted(dataset, name), dataset, "test", 2, measure=measure)
    assert 1000 < found < 100_000
    assert f"{name}: a live prediction takes {found:.0f} us here; give it again with --prediction_us {found:.0f}" in (
        capsys.readouterr().err
    )


def test_a_predictor_is_measured_with_the_columns_that_it_sees(dataset: TraceDataset) -> None:
    predictor: Predictor = create("rank_path").fit(dataset, max_steps=2)
    assert "weights" in predictor.sees(dataset.available)
    assert prediction_us(predictor, dataset, "test", 1, measure=True) > 0
