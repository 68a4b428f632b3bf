"""Token journeys in a real browser: what is shown is what the traces hold, by mouse and by keyboard, without lag."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.palette import expert_colours
from analysis.report import write_report
from speculation.predictor import Predictor, create
from traces.reader import TraceDataset

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    OpenPage = Callable[..., Page]

pytestmark = pytest.mark.browser

WORDS = ("The", " cat", " sat", " on", " the", " mat", ".", "\n")
STEP_MS = 100  # of work in one step, at most in the median: several times what a free machine needs
STEPS = """async ([key, steps]) => {
  const canvases = [...document.querySelectorAll("#journey-grid .sheet canvas")], times = [];
  const view = document.querySelector("#journey-grid .window");
  const sample = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  canvases[0].focus();
  for (let step = 0; step < steps; step++) {
    const began = performance.now();
    if (key === "scroll") { view.scrollLeft = 53 * step; journeys.grid.draw(); }
    else canvases[0].dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    document.body.getBoundingClientRect();  // layout
    for (const canvas of canvases) sample.drawImage(canvas, 0, 0, 1, 1, 0, 0, 1, 1);
    sample.getImageData(0, 0, 1, 1);  // paint
    times.push(performance.now() - began);
    await new Promise((go) => requestAnimationFrame(go));
  }
  return times;
}"""

AS_OPENED = """async () => {
  const { find, state } = journeys;
  find("search").value = "";
  journeys.search.run();
  for (const [id, value] of [["predictor", "0"], ["view", "experts"]]) find(id).value = value;
  Object.assign(state, { layer: 0, predictor: 0, view: "experts", expert: null, pinned: null, pinnedByReader: false });
  find("numbers").open = false;
  await journeys.load(Math.max(0, report.journeys.sequences.findIndex((each) => each.split === "test")));
  window.scrollTo(0, 0);
}"""


@pytest.fixture(scope="module")
def written(make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report of six sequences of plain words in 3 layers, 2 of 8 experts, and its numbers."""
    dataset = TraceDataset(make_run(texts=WORDS, datasets=("code", "prose"), model="tiny", tokens=(20, 40)))
    predictors: dict[str, Predictor] = {name: create(name).fit(dataset) for name in ("markov", "repeat")}
    output = tmp_path_factory.mktemp("journeys") / "report.html"
    return output, write_report(dataset, predictors, output, journeys=6)


@pytest.fixture(scope="module")
def opened(open_page_once: "OpenPage", written: tuple[Path, dict[str, Any]]) -> "Page":
    return open_page_once(written[0])


@pytest.fixture
def page(opened: "Page") -> "Page":
    """The page of `written`, opened once, as it is when it has been opened."""
    opened.evaluate(AS_OPENED)
    return opened


@pytest.fixture(scope="module")
def sequences(written: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    return list(written[1]["journeys"])


def place(page: "Page") -> int:
    return int(page.locator("#journey-sequence").input_value())


def status(page: "Page") -> str:
    return page.locator("#journey-status").inner_text()


def token(page: "Page", number: int) -> "Locator":
    return page.locator(f'#journey-tokens [data-token="{number}"]')


def shared(a: dict[str, Any], token_a: int, b: dict[str, Any], token_b: int) -> list[int]:
    return [
        len(set(one) & set(other))
        for one, other in zip(a["expert_ids"][token_a], b["expert_ids"][token_b], strict=True)
    ]


def test_the_sequence_is_chosen_from_the_list_and_by_the_buttons(page: "Page", sequences: list[dict[str, Any]]) -> None:
    for act, expected in (
        (lambda: page.locator("#journey-sequence").select_option("3"), 3),
        (lambda: page.get_by_label("Next sequence").click(), 4),
        (lambda: page.get_by_label("Previous sequence").click(), 3),
        (lambda: page.locator("#journey-sequence").select_option("5"), 5),
        (lambda: page.get_by_label("Next sequence").click(), 0),  # round to the first
    ):
        act()
        page.get_by_text(f"key {sequences[expected]['sequence_key']}, ").wait_for()
        assert place(page) == expected
        assert page.locator("#journey-tokens .token").all_inner_texts() == sequences[expected]["tokens"]


def test_a_cell_pointed_at_tells_its_experts_weights_and_the_guess(
    page: "Page", sequences: list[dict[str, Any]]
) -> None:
    page.locator("#journey-predictor").select_option(label="repeat")
    sequence = sequences[place(page)]
    cells = page.locator("#journey-grid .sheet canvas").first
    size = page.evaluate("[journeys.state.cell, journeys.grid.top(), journeys.grid.height]")
    cells.scroll_into_view_if_needed()
    cells.hover(position={"x": 2.5 * size[0], "y": size[1] + 1.5 * size[2]})
    tip = page.locator("#journey-grid .tip")
    experts, weights = sequence["expert_ids"][2][1], sequence["routing_weights"][2][1]
    guess = sequence["guesses"]["repeat"][2][1]
    assert "token 2, layer 1" in tip.inner_text()
    rows = [row.split() for row in tip.locator(".row:not(.guessed)").all_inner_texts()]
    assert [int(row[1]) for row in rows] == experts
    np.testing.assert_allclose([float(row[2]) for row in rows], weights, atol=0.006)
    assert f"repeat guessed: {len(set(guess) & set(experts))} of 2 right" in tip.inner_text()
    for row, expert in zip(tip.locator(".guessed").all_inner_texts(), guess, strict=True):
        assert f"expert {expert}" in row
        assert ("right" in row) == (expert in experts)
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def cell_colours(
    sequence: dict[str, Any], scale: float, paper: tuple[int, int, int], cells: Any
) -> NDArray[np.float64]:
    """The colours [cell, RGB] on a light page: the first expert's, mixed with paper where its weight is less."""
    palette = expert_colours(8, "light")
    colours = []
    for number, layer in cells:
        expert, weight = sequence["expert_ids"][number][layer][0], sequence["routing_weights"][number][layer][0]
        strength = 0.3 + 0.7 * weight / scale
        colour = np.array([int(palette[expert][i : i + 2], 16) for i in (1, 3, 5)])
        colours.append(strength * colour + (1 - strength) * np.array(paper))
    return np.array(colours)


def test_the_grid_is_painted_in_the_colour_of_the_first_expert_with_its_weight_as_strength(
    page: "Page", sequences: list[dict[str, Any]]
) -> None:
    sequence = sequences[place(page)]
    read = """([token, layer]) => {
      const { grid, state } = journeys, sample = new OffscreenCanvas(1, 1).getContext("2d");
      sample.drawImage(grid.cells, token * state.cell + 3, grid.top() + layer * grid.height + 3, 1, 1, 0, 0, 1, 1);
      return [...sample.getImageData(0, 0, 1, 1).data];
    }"""
    scale = max(np.max(each["routing_weights"]) for each in sequences)
    cells = [(0, 0), (3, 1), (5, 2), (7, 0)]
    painted = [page.evaluate(read, cell)[:3] for cell in cells]
    np.testing.assert_allclose(painted, cell_colours(sequence, scale, (0xFC, 0xFB, 0xF9), cells), atol=2)
    marked = page.evaluate("journeys.grid.marks.toDataURL()")
    page.locator("#journey-grid .sheet canvas").first.press("ArrowDown")
    assert page.evaluate("journeys.grid.marks.toDataURL()") != marked


def test_the_printed_grid_has_the_colours_of_paper_on_a_dark_screen_too(
    page: "Page", sequences: list[dict[str, Any]]
) -> None:
    page.emulate_media(color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    read = """([token, layer]) => {
      const band = document.querySelector("#journey-print canvas"), sample = new OffscreenCanvas(1, 1).getContext("2d");
      const scale = band.width / parseFloat(band.style.width), height = (parseFloat(band.style.height) - 76) / 3;
      sample.drawImage(band, scale * (46 + 11 * token + 4), scale * (74 + height * layer + 4), 1, 1, 0, 0, 1, 1);
      return [...sample.getImageData(0, 0, 1, 1).data];
    }"""
    scale = max(np.max(each["routing_weights"]) for each in sequences)
    cells = [(0, 0), (3, 1), (5, 2), (7, 0)]
    painted = [page.evaluate(read, cell)[:3] for cell in cells]
    np.testing.assert_allclose(painted, cell_colours(sequences[place(page)], scale, (255, 255, 255), cells), atol=2)
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(color_scheme="light")


def test_clicked_tokens_draw_their_paths_and_clicked_again_lose_them(page: "Page") -> None:
    chips, paths = page.locator("#journey-chips button"), page.locator("#journey-paths path")
    assert (chips.count(), paths.count()) == (2, 2)  # a pair to begin with
    token(page, 1).click()
    assert (chips.count(), paths.count(), page.locator("#journey-paths circle").count()) == (3, 3, 3 * 3 * 2)
    assert token(page, 1).get_attribute("aria-selected") == "true"
    token(page, 1).click()
    assert (chips.count(), paths.count()) == (2, 2)
    cell = page.evaluate("journeys.state.cell")
    page.locator("#journey-grid .sheet canvas").first.click(position={"x": 2.5 * cell, "y": 100})
    assert page.locator("#journey-chips button").last.inner_text().split()[:2] == ["c", "2"]
    page.locator("#journey-paths circle").first.hover()
    assert re.match(r"Token \d+ .*layer 0: experts", page.locator("#journey-paths title").first.text_content() or "")
    while chips.count():
        chips.first.click()
    assert "Click tokens" in page.locator("#journey-paths-note").inner_text()


def test_two_tokens_are_compared_also_across_sequences(page: "Page", sequences: list[dict[str, Any]]) -> None:
    page.locator("#journey-sequence").select_option("2")
    page.get_by_text(f"key {sequences[2]['sequence_key']}, ").wait_for()
    note = page.locator("#journey-compare-note")

    def check(a: int, token_a: int, b: int, token_b: int) -> None:
        counts = shared(sequences[a], token_a, sequences[b], token_b)
        text = note.inner_text()
        assert f"share {sum(counts)} of 6 experts ({100 * sum(counts) / 6:.1f} %;" in text
        assert "would share 25.0 %" in text
        parts = next((layer for layer, count in enumerate(counts) if count < 2), None)
        if parts is None:
            assert "They never part." in text
        else:
            assert ("They part at once" if parts == 0 else f"They part first at layer {parts}.") in text
        assert [int(cell) for cell in page.locator("#journey-compare .agreement td").all_inner_texts()] == counts
        for row, (sequence, number) in enumerate(((a, token_a), (b, token_b))):
            cells = page.locator("#journey-compare tbody tr").nth(row).locator("td")
            for layer in range(3):
                experts = {int(expert) for expert in cells.nth(layer).locator(".expert").all_inner_texts()}
                assert experts == set(sequences[sequence]["expert_ids"][number][layer])
                assert cells.nth(layer).locator(".shared").count() == counts[layer]

    token(page, 9).click()
    page.get_by_role("button", name="Pin the current token as A").click()
    assert "A is the current token itself" in note.inner_text()
    token(page, 12).click()
    check(2, 9, 2, 12)
    page.locator("#journey-closest button").first.click()
    closest = int(page.evaluate("journeys.state.token"))
    check(2, 9, 2, closest)
    others = [number for number in range(len(sequences[2]["tokens"])) if number != 9]
    assert sum(shared(sequences[2], 9, sequences[2], closest)) == max(
        sum(shared(sequences[2], 9, sequences[2], other)) for other in others
    )
    page.get_by_label("Next sequence").click()
    page.get_by_text(f"key {sequences[3]['sequence_key']}, ").wait_for()
    token(page, 4).click()
    check(2, 9, 3, 4)
    assert "of another sequence" in note.inner_text()

    page.locator("#journey-view").select_option("shared")
    share = np.mean([np.sum(shared(sequences[2], 9, sequences[3], i)) / 6 for i in range(len(sequences[3]["tokens"]))])
    assert f"{100 * share:.1f} % of this sequence's experts are A's" in page.locator("#journey-legend").inner_text()


def test_the_share_that_the_predictor_named_is_that_of_the_guesses(
    page: "Page", sequences: list[dict[str, Any]]
) -> None:
    sequence = sequences[place(page)]
    for name in ("markov", "repeat"):
        page.locator("#journey-predictor").select_option(label=name)
        page.locator("#journey-view").select_option("right")
        hits = [
            len(set(own) & set(guess))
            for tokens in zip(sequence["expert_ids"], sequence["guesses"][name], strict=True)
            for own, guess in zip(*tokens, strict=True)
        ]
        legend = page.locator("#journey-legend").inner_text()
        assert f"experts {name} named" in legend
        assert f"{50 * np.mean(hits):.1f} % of this sequence's experts were named" in legend
    page.locator("#journey-view").select_option("experts")
    only = page.get_by_role("button", name="Show expert 3 only")
    only.click()
    assert only.get_attribute("aria-pressed") == "true"
    page.locator("#journey-zoom").fill("4")
    assert page.evaluate("journeys.state.cell") == 4


def test_search_finds_text_across_tokens_in_all_sequences_and_steps_through_the_matches(
    page: "Page", sequences: list[dict[str, Any]]
) -> None:
    wanted = "the mat"
    texts = ["".join(sequence["tokens"]).replace("↵", " ").lower() for sequence in sequences]
    total, within = sum(text.count(wanted) for text in texts), sum(wanted in text for text in texts)
    page.locator("#journey-sequence").select_option("0")
    page.get_by_text(f"key {sequences[0]['sequence_key']}, ").wait_for()
    token(page, 0).focus()
    page.keyboard.press("/")
    page.keyboard.type("THE mat")
    said = page.locator("#journey-matches")
    assert re.fullmatch(rf"\d+ of {total} matches in {within} sequences", said.inner_text())
    seen = set()
    for _ in range(total):
        number = int(said.inner_text().split()[0])
        page.wait_for_function("document.querySelectorAll('#journey-tokens .match').length === 2")
        assert page.locator("#journey-tokens .match").all_inner_texts() == [" the", " mat"]
        seen.add((place(page), page.evaluate("journeys.state.token")))
        page.locator("#journey-search").press("Enter")
        page.get_by_text(f"{number % total + 1} of {total} matches").wait_for()
    assert len(seen) == total
    before = said.inner_text()
    page.get_by_label("Next match").click()
    assert said.inner_text() != before
    page.get_by_label("Previous match").click()
    assert said.inner_text() == before
    page.locator("#journey-search").fill("no such text")
    assert said.inner_text() == "no match"
    page.locator("#journey-search").press("Escape")
    assert said.inner_text() == ""
    assert page.locator("#journey-tokens .found").count() == 0


def test_the_keyboard_steps_through_tokens_layers_sequences_and_matches(
    page: "Page", sequences: list[dict[str, Any]]
) -> None:
    page.locator("#journey-sequence").select_option("1")
    page.get_by_text(f"key {sequences[1]['sequence_key']}, ").wait_for()
    assert all(key in page.locator("#journey-keys").inner_text() for key in ("←", "↓", "PgDn", "Enter", "c", "/", "n"))
    page.locator("#journey-tokens .token[tabindex='0']").focus()
    page.keyboard.press("Home")
    assert status(page).startswith("Token 0 “The”, layer 0: experts ")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    experts = sequences[1]["expert_ids"][1][1]
    assert status(page).startswith(f"Token 1 “cat”, layer 1: experts {experts[0]} (")
    assert page.evaluate("document.activeElement.dataset.token") == "1"
    page.keyboard.press("Enter")
    assert token(page, 1).get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    assert page.evaluate("journeys.state.token") == len(sequences[1]["tokens"]) - 1
    page.keyboard.press("c")
    assert page.locator("#journey-tokens .pinned").count() == 1
    page.keyboard.press("PageDown")
    page.get_by_text(f"key {sequences[2]['sequence_key']}, ").wait_for()
    page.locator("#journey-search").fill("sat")
    page.locator("#journey-tokens .token[tabindex='0']").focus()
    first = page.locator("#journey-matches").inner_text()
    page.keyboard.press("n")
    assert page.locator("#journey-matches").inner_text() != first
    page.keyboard.press("Shift+N")
    assert page.locator("#journey-matches").inner_text() == first
    cells = page.locator("#journey-grid .sheet canvas").first
    cells.focus()
    cells.press("ArrowUp")
    assert page.locator("#journey-grid .tip").is_visible()
    cells.press("Escape")
    assert page.locator("#journey-grid .tip").is_hidden()
    page.locator("#journey-numbers summary").click()
    page.locator("#journey-numbers tbody tr").nth(2).wait_for()  # the third layer


def test_300_experts_in_no_known_order_without_weights_are_shown_too(
    open_page: "OpenPage", make_run: Any, tmp_path: Path
) -> None:
    run = make_run(layers=2, experts=300, top_k=3, sequences=4, store=(), order="unknown", texts=WORDS, model="wide")
    numbers = write_report(run, {}, tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    sequence = numbers["journeys"][place(page)]
    page.locator("#journey-grid .sheet canvas").first.press("Home")
    page.locator("#journey-grid .sheet canvas").first.press("ArrowDown")
    tip = page.locator("#journey-grid .tip")
    assert [int(row.split()[1]) for row in tip.locator(".row").all_inner_texts()] == sequence["expert_ids"][0][1]
    assert tip.locator(".bar").count() == 0
    assert "whose order is not known" in page.locator("#journey-legend").inner_text()
    assert "of each layer's experts, the one that this text uses" in page.locator("#journey-paths-note").inner_text()
    uses = np.array(sequence["expert_ids"])
    chosen = page.evaluate("journeys.state.chosen[0]")
    for layer in range(2):
        counts = np.bincount(uses[:, layer].ravel(), minlength=300)
        lead = page.evaluate(f"journeys.own({chosen}, {layer})[journeys.leads[{chosen} * 2 + {layer}]]")
        assert counts[lead] == counts[uses[chosen, layer]].max()
    assert (page.locator("#journey-paths path").first.get_attribute("d") or "").count("C") == 1  # one line, no tangle
    drawn = "journeys.grid.cells.toDataURL()"
    before = page.evaluate(drawn)
    page.get_by_label("Show expert only").fill(str(sequence["expert_ids"][0][0][1]))
    page.get_by_label("Show expert only").press("Enter")
    assert page.evaluate(drawn) != before


def test_512_tokens_in_32_layers_step_and_scroll_without_lag(
    open_page: "OpenPage", make_run: Any, tmp_path: Path
) -> None:
    run = make_run(
        layers=32, experts=64, top_k=4, sequences=2, tokens=(560, 561), texts=WORDS, datasets=("a",), model="big"
    )
    output = tmp_path / "report.html"
    write_report(TraceDataset(run), {"repeat": create("repeat").fit(TraceDataset(run))}, output)
    page = open_page(output)
    assert page.locator("#journey-tokens .token").count() == 512
    for key in ("ArrowRight", "ArrowDown", "scroll"):
        taken = statistics.median(page.evaluate(STEPS, [key, 40]))
        assert taken < STEP_MS, f"{key}: {taken:.0f} ms in the median"
