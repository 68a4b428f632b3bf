"""The section of two runs: what it shows, in which words, and what it says where it can show less."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from analysis.counts.comparison import compare
from analysis.figures import Section
from analysis.report import write_report
from analysis.sections import comparison
from traces.reader import TraceDataset
from traces.schema import SequenceTrace

Write = Callable[..., TraceDataset]
ALL = ["comparison_agreement", "comparison_datasets", "comparison_weights", "comparison_usage", "comparison_experts",
       "comparison_effective"]  # fmt: skip


@pytest.fixture(scope="module")
def sequences(dataset: TraceDataset) -> list[SequenceTrace]:
    return list(dataset.sequences(columns=("weights", "tokens")))


def section(first: TraceDataset, second: TraceDataset) -> Section:
    made = comparison.make(first, second, compare(first, second, permutations=100, resamples=50))
    json.dumps(made.numbers, allow_nan=False)
    for figure in made.figures:
        go.Figure(figure.spec)  # raises on any unknown attribute
        assert figure.rows, figure.key
        assert {len(row) for row in figure.rows} == {len(figure.columns)}, figure.key
    return made


def keys(made: Section) -> list[str]:
    return [figure.key for figure in made.figures]


def said(made: Section) -> str:
    return " ".join(notice.text for notice in made.notices)


def test_a_run_beside_itself_agrees_fully_and_says_so(dataset: TraceDataset) -> None:
    made = section(dataset, dataset)
    assert keys(made) == ALL
    assert not made.notices
    sentences = {figure.key: figure.sentence for figure in made.figures}
    assert (
        "100.0 % are chosen by both runs on the mean over layers, in every layer alike"
        in (sentences["comparison_agreement"])
    )
    assert "share 100.0 % of the experts on each of them" in sentences["comparison_datasets"]
    assert "here no weight differs" in sentences["comparison_weights"]
    assert (
        "On the same texts both runs use every expert exactly alike: the divergence is 0 in every layer"
        in (sentences["comparison_usage"])
    )
    assert "equally often on the same texts" in sentences["comparison_experts"]
    assert all(row[2] == 100 for row in made.figures[0].rows if "apart" not in row[0])
    assert made.values["names"][0] != made.values["names"][1]


def test_a_changed_run_is_told_where_it_changed(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    def changed(sequence: SequenceTrace) -> SequenceTrace:
        ids_TLK = sequence.expert_ids_TLK.copy()
        ids_TLK[:, 2] = np.where(ids_TLK[:, 2] == 5, 6, ids_TLK[:, 2])
        doubled_T = ids_TLK[:, 2, 0] == ids_TLK[:, 2, 1]
        ids_TLK[doubled_T, 2] = sequence.expert_ids_TLK[doubled_T, 2]
        return replace(sequence, expert_ids_TLK=ids_TLK)

    second = write_run(replace(dataset.spec, quantization="nf4"), [changed(each) for each in sequences[:50]])
    made = section(dataset, second)
    rows = {(row[0], row[1]): row for row in next(f for f in made.figures if f.key == "comparison_usage").rows}
    assert rows["same texts", 0][2] == rows["same texts", 1][2] == 0
    assert rows["same texts", 2][2] > 0.01
    assert rows["same texts", 2][6] < 0.05
    assert ("all texts", 2) in rows
    sentences = {figure.key: figure.sentence for figure in made.figures}
    assert "in 1 of 3 layers (q < 0.05), most in layer 2" in sentences["comparison_usage"]
    assert "most of all expert" in sentences["comparison_experts"]
    assert "of layer 2, by" in sentences["comparison_experts"]
    assert "layer 2 to 100.0 % in layer 0" in sentences["comparison_agreement"]
    assert "10 of the first and 0 of the second have no partner" in said(made)
    facts = {name: (first, second, differ) for name, first, second, differ in made.values["facts"]}
    assert facts["quantisation"] == ("none", "nf4", True)
    assert not facts["precision: model, router"][2]
    assert [run["num_tokens"] for run in made.numbers["comparison"]["runs"]] == [dataset.num_tokens, second.num_tokens]
    agreement = made.numbers["comparison"]["agreement"]
    assert agreement["sequences"] == 50
    assert agreement["by_layer"][2]["shared"]["value"] < 1 == agreement["by_layer"][0]["shared"]["value"]


def test_runs_without_a_common_text_say_so_and_how_to_get_some(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write
) -> None:
    made = section(write_run(dataset.spec, sequences[:30]), write_run(dataset.spec, sequences[30:]))
    assert keys(made) == ["comparison_usage", "comparison_experts", "comparison_effective"]
    assert "No text stands in both runs (by their token ids)" in said(made)
    assert "expert-speculation collect" in made.notices[0].commands[0]
    assert "part of it is that of the texts" in made.figures[0].sentence


@pytest.mark.parametrize(
    ("other", "sentence"),
    [({"layers": 5}, "3 and 5 MoE layers"), ({"experts": 16}, "8 and 16 experts per layer")],
)
def test_runs_of_other_shapes_show_what_is_comparable(
    dataset: TraceDataset, make_run: Any, other: dict[str, int], sentence: str
) -> None:
    made = section(dataset, TraceDataset(make_run(**other)))
    assert keys(made) == ["comparison_effective"]
    assert sentence in said(made)
    assert len(made.figures[0].rows) == 3 + other.get("layers", 3)


def test_what_one_run_does_not_know_is_left_out_with_its_reason(dataset: TraceDataset, make_run: Any) -> None:
    made = section(dataset, TraceDataset(make_run(store=(), order="unknown")))
    assert keys(made) == [key for key in ALL if key != "comparison_weights"]
    assert "order of a token's experts" in said(made)
    assert "does not hold the routing weights" in said(made)
    assert {row[0] for row in made.figures[0].rows} == {"experts shared", "same set", "experts shared, if chosen apart"}


def test_the_report_holds_the_section_and_its_numbers(
    dataset: TraceDataset, sequences: list[SequenceTrace], write_run: Write, tmp_path: Path
) -> None:
    output = tmp_path / "report.html"
    second = write_run(replace(dataset.spec, model_name="<img src=x onerror=alert(1)>"), sequences[:20])
    numbers = write_report(dataset, {}, output, compared_with=second, journeys=1)
    assert numbers["sections"]["comparison"]["figures"] == ALL
    assert numbers["comparison"]["matched_sequences"] == 20
    assert numbers["comparison"]["runs"][1]["model_name"] == "<img src=x onerror=alert(1)>"
    html = output.read_text("utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "<img" not in html[: html.index('id="report-data"')]
    json.dumps(numbers, allow_nan=False)
    write_report(dataset, {}, output, journeys=1)
    assert "Comparison of two runs" not in output.read_text("utf-8")


@pytest.mark.browser
def test_the_page_draws_every_figure_of_the_comparison_and_of_several_horizons(
    open_page: Callable[..., Any],
    dataset: TraceDataset,
    sequences: list[SequenceTrace],
    evaluation: dict[str, Any],
    write_run: Write,
    tmp_path: Path,
) -> None:
    output = tmp_path / "report.html"
    second = write_run(replace(dataset.spec, quantization="<b>nf4</b>"), sequences[:40])
    write_report(
        dataset, {}, output, evaluation=[evaluation, evaluation | {"horizon": 2}], compared_with=second, journeys=0
    )
    page = open_page(output)  # fails on errors, requests and empty figures
    for key in (*ALL, "accuracy_by_horizon", "accuracy_by_dataset", "accuracy_by_position"):
        assert page.locator(f"[data-figure={key}]").count() == 1, key
    table = page.locator("#comparison table").first
    assert "<b>nf4</b>" in table.inner_text()
    assert table.locator("td.differs").count() == 4  # quantisation, and the number of sequences
    page.locator("#comparison details").first.locator("summary").click()
    page.locator("#comparison details").first.locator("tbody tr").nth(11).wait_for()
    assert page.locator("#comparison details").first.locator("tbody tr").count() == 12
