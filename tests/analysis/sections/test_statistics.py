"""The sections of the statistics on runs of every shape: valid figures, full tables, numbers that fit the counts."""

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from analysis.counts.run_counts import RunCounts
from analysis.figures import Section
from analysis.matrices import MAX_OCTAVES, NEVER, Matrices, lifts, octaves, shown_layers
from analysis.sections import coactivation, locality, specialisation, token_classes, transitions, usage
from traces.reader import TraceDataset

MakeRun = Callable[..., Path]


def sections_of(dataset: TraceDataset) -> dict[str, Section]:
    counts = RunCounts(dataset).read(dataset)
    made = (
        usage.make(counts.usage),
        specialisation.make(counts.usage),
        coactivation.make(counts.coactivation, dataset.spec.top_k),
        transitions.make(counts.transitions, counts.layer_information.information(), dataset.spec.top_k),
        locality.make(counts.locality, counts.stacks, counts.usage.share_LE()),
        token_classes.make(counts.token_classes),
    )
    return {section.key: section for section in made}


@pytest.fixture(scope="module")
def made(dataset: TraceDataset) -> dict[str, Section]:
    return sections_of(dataset)


def check(section: Section) -> None:
    json.dumps([section.numbers, section.data, section.values], allow_nan=False)
    for figure in section.figures:
        assert go.Figure(figure.spec).data, figure.key  # raises on any unknown attribute
        assert figure.title
        assert figure.sentence.endswith(".")
        assert "nan" not in figure.sentence.split()
        assert figure.rows, figure.key
        assert {len(row) for row in figure.rows} == {len(figure.columns)}, figure.key
        json.dumps([figure.spec, figure.rows], allow_nan=False)


SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"layers": 1, "top_k": 1, "experts": 2, "datasets": ("code",), "store": (), "order": "unknown", "sequences": 3},
    {"layers": 2, "top_k": 2, "experts": 2},
    {"layers": 2, "top_k": 3, "experts": 300, "sequences": 12},
    {"sequences": 1, "datasets": ("code",)},
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_figure_is_valid_and_has_a_sentence_and_a_table(make_run: MakeRun, shape: dict[str, Any]) -> None:
    for section in sections_of(TraceDataset(make_run(**shape))).values():
        check(section)


def test_the_sections_show_what_the_counts_say(made: dict[str, Section], dataset: TraceDataset) -> None:
    figures = {figure.key: figure for section in made.values() for figure in section.figures}
    assert list(figures) == [
        *("usage", "datasets", "information", "evenness", "focus_by_layer", "focus"),
        *("coactivation_bits", "pairs", "strongest_pairs"),
        *("predictability", "transitions", "layer_information"),
        *("reuse", "working_set", "hit_rate", "hit_rate_by_layer", "token_classes", "token_class_strength"),
    ]
    counts = RunCounts(dataset).read(dataset)
    np.testing.assert_allclose(
        [row[4:] for row in figures["hit_rate"].rows], 100 * counts.stacks.hit_rate_LC()[:, 2:].T, atol=0.01
    )
    np.testing.assert_allclose(figures["reuse"].rows[0][3:], 100 * counts.locality.reuse_RL()[0], atol=0.01)
    focused = [row[3] for row in figures["focus"].rows]
    assert focused == sorted(focused, reverse=True)
    for layer, a, b, times, tokens, expected in figures["strongest_pairs"].rows:
        assert tokens == counts.coactivation.within_LEE[layer, a, b]
        assert times == pytest.approx(tokens / expected, rel=0.01)


def test_cells_that_may_be_chance_lie_under_a_veil_and_the_table_tells_their_q(made: dict[str, Section]) -> None:
    figure = next(figure for figure in made["usage"].figures if figure.key == "datasets")
    panels, veils = figure.spec["data"][0::2], figure.spec["data"][1::2]
    washed = 0
    for place, (panel, cover) in enumerate(zip(panels, veils, strict=True)):
        for layer, (q, z) in enumerate(zip(panel["customdata"], cover["z"], strict=True)):
            assert [each == 0 for each in z] == [each < 0.05 for each in q]
            assert figure.rows[place * 3 + layer][2 + 8 :] == q
            washed += sum(z)
    assert 0 < washed < 3 * 3 * 8


def test_matrices_unpack_to_what_was_counted_and_thin_out_where_they_would_not_fit() -> None:
    rng = np.random.default_rng(0)
    values = octaves(rng.lognormal(sigma=2, size=(2, 4, 4)))
    values[1, 2, 2] = np.nan
    figure, data = lifts(
        "key", "title", "sentence", [Matrices("kind", values, ["a", "b"], ["r"] * 2, ["c"] * 2)], "%{z}"
    )

    packed = np.frombuffer(gzip.decompress(base64.b64decode(data["packed"])), "<u2").reshape(values.shape)
    unpacked = np.where(packed == NEVER, np.nan, data["low"] + data["unit"] * packed)
    np.testing.assert_allclose(unpacked, values, atol=data["unit"] / 2 + 1e-9)
    assert np.abs(values[np.isfinite(values)]).max() <= MAX_OCTAVES
    assert figure.spec["data"][0]["z"] == np.round(values[0], 4).tolist()
    assert shown_layers(24, 32) == list(range(24))
    assert shown_layers(48, 128)[0] == 0
    assert shown_layers(48, 128)[-1] == 47
    assert 2 * len(shown_layers(48, 128)) * 128**2 <= 500_000
    assert shown_layers(3, 5000) == [0]


def test_hostile_token_text_is_readable_in_the_examples(made: dict[str, Section]) -> None:
    strongest = made["token_classes"].values["strongest"]
    assert isinstance(strongest, list)
    texts = "".join(text for row in strongest for text in row["examples"])
    assert not set("\x00\x1b\u202e\u200b") & set(texts)
