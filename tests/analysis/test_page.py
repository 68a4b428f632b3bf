"""The whole report in a real browser: every control, hostile text, screen readers, contrast, narrow windows, paper."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from analysis.report import write_report
from analysis.tokens import readable
from speculation.evaluation import evaluate
from speculation.predictor import Predictor, create
from traces.reader import TraceDataset

from ..conftest import EMPTY_FIGURES
from .conftest import HOSTILE, HOSTILE_DATASET, HOSTILE_MODEL

if TYPE_CHECKING:
    from playwright.sync_api import Page

    OpenPage = Callable[..., Page]

pytestmark = pytest.mark.browser

CONTRAST = 4.5  # of text against what is behind it, as WCAG 2.2 asks (success criterion 1.4.3); 3 for large text
CHECKS = (Path(__file__).parent / "page_checks.js").read_text("utf-8")
RAW_KEY = "</script><img src=x onerror=document.documentElement.dataset.hacked=5>"
RAW_NAME = "<img src=x onerror=document.documentElement.dataset.hacked=6>\u202e"


def check(page: "Page", call: str) -> Any:
    """Return what a function of page_checks.js finds."""
    return page.evaluate(f"(() => {{ {CHECKS}; return {call}; }})()")


def draw_figures(page: "Page") -> None:
    assert page.evaluate(EMPTY_FIGURES) == []


@pytest.fixture(scope="module")
def report_file(
    dataset: TraceDataset,
    predictors: dict[str, Predictor],
    evaluation: dict[str, Any],
    simulation: dict[str, Any],
    make_run: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report of everything: predictors, two horizons, two simulations, and a second run of the same texts."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    further = evaluate(dataset, {"markov@<b>mine": predictors["markov"]}, horizon=2, bootstrap=50)
    other = TraceDataset(make_run(model="the other", experts=16))
    write_report(
        dataset,
        predictors,
        output,
        evaluation=[evaluation, further],
        simulations=[simulation, simulation],
        compared_with=other,
        journeys=6,
    )
    return output


@pytest.fixture(scope="module")
def page(open_page_once: "OpenPage", report_file: Path) -> "Page":
    """The report of everything, opened once; a test leaves media and window as they were."""
    return open_page_once(report_file, has_touch=True)


def test_every_control_works_without_an_error(page: "Page") -> None:
    sections = page.locator("nav.contents a").all()
    assert {"#accuracy", "#prefetching", "#comparison", "#journeys"} <= {
        link.get_attribute("href") for link in sections
    }
    for link in sections:
        link.click()
    details = page.locator("main details").all()
    assert len(details) > 8
    for each in details:
        each.locator("summary").click()
        each.locator("tbody tr").first.wait_for()
    for select in page.locator("main select").all():
        for option in select.locator("option").all():
            select.select_option(option.get_attribute("value"))
    for slider in page.locator("main input[type=range]").all():
        for end in ("max", "min"):
            slider.fill(slider.get_attribute(end) or "0")
    for figure in page.locator("[data-figure]").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
        figure.hover()
    legend = page.locator("[data-figure] .legendtoggle").first
    legend.click()  # hides a line
    page.wait_for_timeout(400)  # else plotly takes the next for a double click
    legend.click()  # and shows it again
    for button in page.locator("main button:visible").all():
        if button.is_visible():  # a path's goes with its path
            button.click()
    page.emulate_media(color_scheme="dark")
    page.emulate_media(color_scheme="light")


def test_the_transitions_step_from_layer_to_layer(page: "Page") -> None:
    section = page.locator("#transitions")
    section.locator("select").first.select_option(index=0)
    section.get_by_label("Layer", exact=True).first.fill("0")
    section.get_by_label("Next layer").first.click()
    assert section.get_by_text("layer 1 → 2").first.is_visible()
    section.locator("select").first.select_option(index=1)
    assert section.get_by_text("layer 1", exact=True).first.is_visible()
    section.get_by_label("Previous layer").first.click()
    assert section.get_by_text("layer 0", exact=True).first.is_visible()


def test_hostile_text_makes_no_element_and_runs_nothing(open_page: "OpenPage", make_run: Any, tmp_path: Path) -> None:
    """The same run with harmless text gives a page of exactly the same elements."""
    harmless = tuple("\n" if text == "\n" else f"word{place}" for place, text in enumerate(HOSTILE))
    tags = []
    for texts, name, model, key in (
        (HOSTILE, HOSTILE_DATASET, HOSTILE_MODEL, RAW_KEY),
        (harmless, "a-tame-data-set", "a tame model", "text"),
    ):
        wild = texts is HOSTILE
        dataset = TraceDataset(make_run(texts=texts, datasets=(name, "code"), model=model, key=key, tokens=(20, 30)))
        predictor = RAW_NAME if wild else "tame"
        fitted = {predictor: create("markov").fit(dataset)}
        output = tmp_path / f"{wild}.html"
        evaluation = evaluate(dataset, fitted, bootstrap=20)
        numbers = write_report(dataset, fitted, output, evaluation=evaluation, journeys=4)
        page = open_page(output)
        draw_figures(page)
        for details in page.locator("main details").all():
            details.evaluate("each => { each.open = true; }")
        page.locator("#journey-numbers tbody tr").first.wait_for()
        page.locator("#journey-sequence").select_option("0")
        page.get_by_text(f"key {readable(key)}").wait_for()
        cells = page.locator("#journey-grid .sheet canvas").first
        for _ in texts:
            cells.press("ArrowRight")
            cells.press("Enter")
        tags.append(Counter(check(page, "elements()")))
        assert page.evaluate("document.documentElement.dataset.hacked ?? null") is None
        assert (
            page.locator(".plot a, .plot image[href^='http'], [onload], [onerror], [href^='javascript:']").count() == 0
        )
        if wild:
            shown = page.locator("#journey-tokens .token").all_inner_texts()
            assert shown[: len(texts)] == [readable(text) for text in texts]
            assert page.locator("h1").inner_text() == readable(model)
            assert page.locator("#journey-predictor option").all_inner_texts() == [readable(predictor)]
            assert readable(predictor) in page.locator("#journey-grid .tip").inner_text()
            assert page.locator("#journey-sequence optgroup").first.get_attribute("label") == readable(HOSTILE_DATASET)
            page.locator("#journey-search").fill("<img src=x")
            count = sum(text.startswith("<img") for journey in numbers["journeys"] for text in journey["tokens"])
            page.get_by_text(f" of {count} matches in 4 sequences").wait_for()
            embedded = re.search(
                r'<script type="application/json" id="report-data">(.*?)</script>', output.read_text("utf-8"), re.DOTALL
            )
            assert embedded
            assert "<" not in embedded[1]
            assert "\\u003cimg src=x" in embedded[1]
    assert tags[0] == tags[1]


def test_the_smallest_model_comes_up_with_journeys_and_without(
    open_page: "OpenPage", make_run: Any, tmp_path: Path
) -> None:
    run = make_run(layers=1, top_k=1, experts=2, datasets=("code",), store=(), order="unknown", sequences=3)
    for journeys in (24, 0):
        write_report(run, {}, tmp_path / f"{journeys}.html", journeys=journeys)
        page = open_page(tmp_path / f"{journeys}.html")
        if journeys:
            assert page.locator("#journey-tokens .token").count() > 8
        else:
            assert "--journeys 24" in page.locator("#journeys").inner_text()


def read_again(page: "Page") -> None:
    """Bring the page to the state in which it opens."""
    page.evaluate("history.replaceState(null, '', location.pathname)")  # without the section that was gone to
    page.reload()
    page.locator("html[data-ready]").wait_for(state="attached")


def test_a_screen_reader_finds_names_headings_and_an_order(page: "Page") -> None:
    read_again(page)
    draw_figures(page)
    assert check(page, "structure()") == []
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    nameless = []
    for node in tree["nodes"]:
        focusable = any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", []))
        role = node.get("role", {}).get("value")
        needs = focusable or role in ("image", "listbox", "region", "navigation", "status", "table", "figure")
        if needs and role not in ("RootWebArea", "status", "table") and not node.get("name", {}).get("value"):
            nameless.append(role)
    assert nameless == []


def test_the_tab_key_reaches_every_control_in_reading_order_with_visible_focus(page: "Page") -> None:
    read_again(page)
    page.keyboard.press("Tab")
    steps = 0
    while page.evaluate("document.activeElement !== document.body") and steps < 400:
        assert check(page, "walk()") is None
        page.keyboard.press("Tab")
        steps += 1
    walked = check(page, "walkedInOrder()")
    assert walked == sorted(walked)
    assert check(page, "unreached()") == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page: "Page", mode: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=mode)
    read_again(page)
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    page.evaluate("journeys.state.chosen = [0, 1, 2, 3, 4, 5]; journeys.all()")  # every colour of a path
    page.locator("main details tbody tr").last.wait_for(state="attached")
    draw_figures(page)
    page.locator("#journey-grid .sheet canvas").first.press("ArrowDown")
    page.locator("#journey-view").select_option("right")
    seen, faint = check(page, f"faintText({CONTRAST})")
    assert check(page, "cellColours()") == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    page.emulate_media(color_scheme="light")
    assert seen > 500
    assert faint == []


def test_a_window_of_400_pixels_shows_everything_without_scrolling_sideways(page: "Page") -> None:
    wide = page.viewport_size
    assert wide
    page.set_viewport_size({"width": 400, "height": 800})
    read_again(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert check(page, "stickingOut()") == []
    cells = page.locator("#journey-grid .sheet canvas").first
    cells.scroll_into_view_if_needed()
    cells.tap(position={"x": 200, "y": 120})
    box = page.locator("#journey-grid .tip").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 400
    page.set_viewport_size(wide)


def test_numbers_of_an_axis_and_titles_of_panels_end_where_the_next_begin(
    open_page: "OpenPage", make_run: Any, tmp_path: Path
) -> None:
    names = (HOSTILE_DATASET, "a-data-set-with-a-name-of-many-letters", "b", "c")
    write_report(make_run(experts=32, layers=24, datasets=names), {}, tmp_path / "report.html", journeys=0)
    page = open_page(tmp_path / "report.html", viewport={"width": 1400, "height": 900})
    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("""new Promise((go) => {
          const look = () => (drawnWidth === window.innerWidth ? go() : setTimeout(look, 20));
          look();
        })""")
        draw_figures(page)
        assert check(page, "overlapping()") == [], width
        assert page.locator("#plot-usage .xtick").count() >= (32 if width == 1400 else 8)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert check(page, "overlapping()") == []
    assert check(page, "tallPlots(620)") == 0


def test_a_column_of_a_table_has_the_same_decimals_throughout(page: "Page") -> None:
    cells = page.evaluate("""() => {
      const table = report.table(["a", "b", "c"], [["x", 1, 2], ["y", 0.25, 1e-9], [3, null, 7]]);
      return [...table.querySelectorAll("tbody tr")].map((row) => [...row.children].map((cell) => cell.textContent));
    }""")
    assert cells == [["x", "1.00", "2"], ["y", "0.25", "1e-9"], ["3", "–", "7"]]


def test_paper_shows_the_whole_sequence_in_light_colours_and_no_controls(page: "Page", tmp_path: Path) -> None:
    page.emulate_media(color_scheme="dark")
    page.locator("#journey-sequence").select_option("0")
    tokens = page.locator("#journey-tokens .token").count()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("addEventListener('beforeprint', () => { window.bands = journeys.find('print').childElementCount; })")
    assert page.pdf(path=tmp_path / "report.pdf").startswith(b"%PDF")
    assert page.evaluate("window.bands") == -(-tokens // 60)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark  # as before
    assert page.locator("#journey-print canvas").count() == 0
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav.contents, .controls, .keys, #journey-grid").locator("visible=true").count() == 0
    assert check(page, "widePlots(700)") == check(page, "tallPlots(620)") == 0
    page.emulate_media(media="screen", color_scheme="light")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
