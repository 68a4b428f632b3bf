"""Figures as files: readable standing alone, drawn by kaleido in Chromium, and refused in a sentence without either."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from analysis.figures import Figure
from analysis.images import check_images, standing_alone, write_images
from analysis.report import write_report
from analysis.sections import accuracy
from groundwork.errors import ConfigurationError
from traces.reader import TraceDataset

TITLE = "A <b>title</b> that is so long that it can not stand in a single line above a figure that is this narrow"


@pytest.fixture
def figure(evaluation: dict[str, Any]) -> Figure:
    made = accuracy.make([evaluation]).figures[1]
    return Figure(made.key, TITLE, made.sentence, made.spec, made.columns, made.rows, max_width=500)


def test_a_figure_alone_has_title_source_axis_labels_and_white_ground(figure: Figure) -> None:
    before = str(figure.spec)
    alone = standing_alone(figure, "mini-mixtral")
    layout = go.Figure(alone).layout
    assert layout.title.text.replace("<br>", " ") == TITLE.replace("<", "&lt;").replace(">", "&gt;")
    assert layout.title.text.count("<br>") == 2
    assert layout.title.subtitle.text == "mini-mixtral"
    assert layout.paper_bgcolor == layout.plot_bgcolor == "#ffffff"
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("experts that may be named", "recall")
    assert layout.xaxis.title.font.size == layout.font.size  # and no larger, as plotly makes it
    assert layout.showlegend
    assert layout.width == 500
    assert layout.height > figure.spec["layout"]["height"]
    assert str(figure.spec) == before


def test_without_kaleido_the_remedy_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ConfigurationError, match=r"needs kaleido.*pip install 'expert-speculation\[figures\]'"):
        check_images(tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_without_a_browser_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed; pip install 'expert-speculation[figures]'")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match=r"Chromium or Chrome, which was not found \(BROWSER_PATH=.*apt-get"):
        check_images(tmp_path / "figures")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigurationError, match="is a file, wanted a folder"):
        check_images(tmp_path / "taken")


@pytest.mark.browser
@pytest.mark.parametrize(("image_format", "begins"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_every_figure_of_a_report_becomes_a_file(
    chromium: str,
    dataset: TraceDataset,
    evaluation: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_format: str,
    begins: bytes,
) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed; pip install 'expert-speculation[figures]'")
    monkeypatch.setenv("BROWSER_PATH", chromium)
    folder = tmp_path / "figures"
    if image_format == "svg":
        check_images(folder)
        numbers = write_report(
            dataset,
            {},
            tmp_path / "r.html",
            evaluation=evaluation,
            compared_with=dataset,
            journeys=0,
            figures_dir=folder,
        )
        drawn = {path.stem for path in folder.iterdir()}
        assert {"usage", "accuracy_by_layer", "comparison_agreement"} <= drawn
        assert drawn <= set(numbers["figures"])
        text = "".join(ElementTree.parse(folder / "accuracy_by_layer.svg").getroot().itertext())
        assert "Recall at 2 experts, by layer" in text
        assert "markov@<b>mine" in text
    else:
        shown = accuracy.make([evaluation]).figures[:1]
        assert write_images(shown, folder, image_format, "m") == [folder / f"accuracy_by_layer.{image_format}"]
    for path in folder.iterdir():
        assert path.read_bytes().startswith(begins), path
