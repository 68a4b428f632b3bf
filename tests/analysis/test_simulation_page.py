"""One simulation as a file of its own: a page that stands alone and runs nothing of its texts, or a picture."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from analysis.report import write_report
from analysis.simulation_page import check_figure, write_figure
from groundwork.errors import ConfigurationError
from traces.reader import TraceDataset

from .conftest import HOSTILE_MACHINE, HOSTILE_MODEL
from .test_page import CONTRAST, check, draw_figures

if TYPE_CHECKING:
    from playwright.sync_api import Page

    OpenPage = Callable[..., Page]


def test_a_file_that_could_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setitem(sys.modules, "kaleido", None)
    for name, swept, message in (
        ("s.gif", True, r"--figure .*s.gif: ends in '.gif', wanted one of .html, .svg, .png, .pdf"),
        ("folder.html", True, "is a folder, wanted a file"),
        ("s.svg", False, "which --sweep_tokens 0 leaves out"),
        ("s.svg", True, r"--figure .*s.svg: needs kaleido"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_figure(tmp_path / name, swept=swept)
    check_figure(tmp_path / "s.html", swept=False)


def test_a_report_shows_the_simulations_it_is_given(
    dataset: TraceDataset, simulation: dict[str, Any], tmp_path: Path
) -> None:
    numbers = write_report(dataset, {}, tmp_path / "r.html", simulations=[simulation, simulation], journeys=0)
    assert numbers["simulations"] == [simulation, simulation]
    assert "prefetching_machines" in numbers["sections"]["prefetching"]["figures"]
    with pytest.raises(ConfigurationError, match=r"^--simulation b.json has format_version 3"):
        write_report(
            dataset, {}, tmp_path / "r.html", simulations=[simulation, simulation | {"format_version": 3}],
            simulation_names=["--simulation a.json", "--simulation b.json"],
        )  # fmt: skip


@pytest.mark.browser
def test_the_page_stands_alone_and_its_texts_run_nothing(
    open_page: "OpenPage", simulation: dict[str, Any], tmp_path: Path
) -> None:
    """The same simulation with harmless names gives a page of exactly the same elements."""
    tags = []
    for wild in (True, False):
        text = json.dumps(simulation)
        if not wild:
            for name, tame in ((HOSTILE_MACHINE, "a machine"), (HOSTILE_MODEL, "tiny"), ("markov@<b>mine", "markov")):
                text = text.replace(name, tame)
        write_figure(json.loads(text), tmp_path / f"{wild}.html")
        page = open_page(tmp_path / f"{wild}.html")
        draw_figures(page)
        for summary in page.locator("main summary").all():
            summary.click()
        page.locator("main details tbody tr").last.wait_for()
        tags.append(Counter(check(page, "elements()")))
        assert page.evaluate("document.documentElement.dataset.hacked ?? null") is None
        assert check(page, "structure()") == []
        if wild:
            assert HOSTILE_MACHINE in page.locator("h1").inner_text()
            assert "markov@<b>mine · guided" in page.locator("#plot-prefetching_speed").inner_text()
            assert page.locator("section").count() == 1
    assert tags[0] == tags[1]


@pytest.mark.browser
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_page_can_be_read_in_both_modes_and_on_a_telephone(
    open_page: "OpenPage", simulation: dict[str, Any], tmp_path: Path, mode: Literal["light", "dark"]
) -> None:
    write_figure(simulation, tmp_path / "s.html")
    page = open_page(tmp_path / "s.html", color_scheme=mode, viewport={"width": 400, "height": 800})
    draw_figures(page)
    seen, faint = check(page, f"faintText({CONTRAST})")
    assert seen > 100
    assert faint == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert check(page, "stickingOut()") == []
    assert check(page, "overlapping()") == []


@pytest.mark.browser
def test_a_picture_has_both_sweeps(
    chromium: str, simulation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed; pip install 'expert-speculation[figures]'")
    monkeypatch.setenv("BROWSER_PATH", chromium)
    write_figure(simulation, tmp_path / "new" / "s.svg")
    text = "".join(ElementTree.parse(tmp_path / "new" / "s.svg").getroot().itertext())
    for shown in ("speed of the link, GB/s", "experts that the GPU holds, of all", HOSTILE_MACHINE[:12], "break-even"):
        assert shown in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.svg"]
