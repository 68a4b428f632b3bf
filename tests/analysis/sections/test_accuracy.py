"""The section of accuracy: every figure against the evaluation it shows, horizons in order, and odd files refused."""

import copy
import json
from typing import Any

import plotly.graph_objects as go
import pytest

from analysis.evaluations import in_order, leader
from analysis.figures import Figure, Section
from analysis.sections import accuracy
from groundwork.errors import ConfigurationError
from speculation.evaluation import evaluate
from speculation.predictor import Predictor
from traces.reader import TraceDataset

NAME = "markov@<b>mine"


@pytest.fixture(scope="module")
def further(dataset: TraceDataset, predictors: dict[str, Predictor]) -> dict[str, Any]:
    return evaluate(dataset, {NAME: predictors["markov"]}, horizon=2, bootstrap=50)


def figures(section: Section) -> dict[str, Figure]:
    for figure in section.figures:
        go.Figure(figure.spec)  # raises on any unknown attribute
        assert figure.rows, figure.key
        assert {len(row) for row in figure.rows} == {len(figure.columns)}, figure.key
    return {figure.key: figure for figure in section.figures}


def test_each_table_holds_the_evaluations_own_numbers(evaluation: dict[str, Any]) -> None:
    section = accuracy.make([evaluation])
    made = figures(section)
    assert list(made) == [
        *("accuracy_by_layer", "accuracy_by_budget", "accuracy_by_dataset", "accuracy_by_position", "differences")
    ]
    scores = evaluation["predictors"][NAME]
    rows = {(row[0], row[1]): row for row in made["accuracy_by_dataset"].rows}
    for name, part in scores["by_dataset"].items():
        row = rows[NAME, name]
        assert row[2:4] == [part["sequences"], part["tokens"]]
        assert row[4:] == [round(100 * part["recall"]["2"][end], 2) for end in ("value", "low", "high")]
    shown = [row for row in made["accuracy_by_position"].rows if row[0] == NAME]
    assert [row[2] for row in shown] == [part["tokens"] for part in scores["by_position"]]
    assert [row[3] for row in shown] == [round(100 * part["recall@2"]["value"], 2) for part in scores["by_position"]]
    assert [row[1] for row in shown][:2] == ["0", "1–3"]
    assert "chance" in {row[0] for row in made["accuracy_by_dataset"].rows}
    assert section.numbers["evaluation"] == evaluation
    assert "--horizon" in section.notices[0].commands[0]


def test_several_horizons_are_drawn_from_the_nearest(evaluation: dict[str, Any], further: dict[str, Any]) -> None:
    section = accuracy.make([evaluation, further])
    rows = figures(section)["accuracy_by_horizon"].rows
    recalls = [round(100 * each["predictors"][NAME]["recall"]["2"]["value"], 2) for each in (evaluation, further)]
    assert [row[1:3] for row in rows if row[0] == NAME] == [[1, recalls[0]], [2, recalls[1]]]
    assert not section.notices
    assert "one layer ahead" in section.lead
    assert section.numbers["evaluation"] == evaluation
    assert section.numbers["further_evaluations"] == [further]


def test_evaluations_are_sorted_and_such_as_do_not_belong_together_are_refused(
    dataset: TraceDataset, evaluation: dict[str, Any], further: dict[str, Any]
) -> None:
    assert in_order([further, evaluation], dataset.spec) == [evaluation, further]
    for wrong, message in (
        (
            [evaluation, evaluation],
            "the evaluation has the horizon 1, and so has the evaluation; give one for each --horizon",
        ),
        ([evaluation, further | {"split": "all"}], "the evaluation has split 'all', the evaluation 'test'"),
        ([evaluation, further | {"tokens": 3}], "the evaluation has tokens 3"),
        ([evaluation, further | {"top_k": 4}], "top_k 4, but 2 is needed here"),
        ([[evaluation]], "not what 'expert-speculation evaluate --json' writes"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            in_order(wrong, dataset.spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", ["recall", "by_layer", "by_dataset", "by_position", "sees", "calibration"])
def test_an_evaluation_that_lacks_a_part_is_shown_without_it_or_refused(evaluation: dict[str, Any], lost: str) -> None:
    partial = copy.deepcopy(evaluation)
    for scores in partial["predictors"].values():
        scores.pop(lost, None)
    if lost == "recall":
        with pytest.raises(ConfigurationError, match="not what 'expert-speculation evaluate --json' writes"):
            accuracy.make([partial])
        return
    keys = [figure.key for figure in accuracy.make([partial]).figures]
    assert f"accuracy_{lost}" not in keys
    assert "accuracy_by_budget" in keys
    json.dumps(accuracy.make([partial]).numbers, allow_nan=False)


def test_sentences_name_the_best_trained_predictor(evaluation: dict[str, Any]) -> None:
    assert leader(evaluation) == NAME
    better = copy.deepcopy(evaluation["predictors"][NAME])
    better["recall"]["2"] = {"value": 0.99, "low": 0.98, "high": 1.0}
    changed = evaluation | {"predictors": evaluation["predictors"] | {"oracle": better}}
    assert leader(changed) == "oracle"
    made = figures(accuracy.make([changed]))
    for key in ("accuracy_by_layer", "accuracy_by_budget", "accuracy_by_dataset", "accuracy_by_position"):
        assert "oracle" in made[key].sentence, key


def test_pairs_say_which_predictor_is_better_and_which_can_not_be_told_apart(evaluation: dict[str, Any]) -> None:
    ends = {"better": (0.02, 0.01, 0.03), "worse": (-0.02, -0.03, -0.01), "no difference shown": (0.01, -0.01, 0.03)}
    pairs = [
        {"a": NAME, "b": word, "metric": "recall@2", "value": value, "low": low, "high": high}
        for word, (value, low, high) in ends.items()
    ]
    turned = [{**pair, "a": pair["b"], "b": pair["a"]} for pair in pairs]
    made = figures(accuracy.make([evaluation | {"differences": pairs + turned}]))["differences"]
    assert [(row[1], row[-1]) for row in made.rows] == [(word, word) for word in ends]  # each pair once
    assert "which 1 of the 3 fails to do" in made.sentence
    assert made.title == "Paired differences in recall at 2"


def test_a_data_set_of_one_sequence_is_said_to_have_no_interval(evaluation: dict[str, Any]) -> None:
    single = copy.deepcopy(evaluation)
    assert "has none" not in figures(accuracy.make([single]))["accuracy_by_dataset"].sentence
    for scores in single["predictors"].values():
        scores["by_dataset"]["code"]["sequences"] = 1
    assert "A single sequence has none (code)." in figures(accuracy.make([single]))["accuracy_by_dataset"].sentence


def test_without_an_evaluation_the_section_says_how_to_get_one() -> None:
    section = accuracy.make([])
    assert not section.figures
    assert "expert-speculation train" in section.notices[0].commands[0]
