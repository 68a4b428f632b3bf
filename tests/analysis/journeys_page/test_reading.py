"""The sequence that is read: chosen, told cell by cell, and painted as the traces say."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.palette import expert_colours

from .conftest import place

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


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


def test_the_words_of_a_cell_at_the_lower_edge_of_the_window_stay_in_it(page: "Page") -> None:
    bottom, height = page.evaluate("""() => {
      const { cells, tip } = journeys.grid;  // in one go, for figures above that are drawn meanwhile move the page
      scrollBy({ top: cells.getBoundingClientRect().bottom - innerHeight, behavior: "instant" });
      const { left, bottom } = cells.getBoundingClientRect();
      cells.dispatchEvent(new PointerEvent("pointermove", { clientX: left + 30, clientY: bottom - 10, bubbles: true }));
      return [tip.getBoundingClientRect().bottom, innerHeight];
    }""")
    assert page.locator("#journey-grid .tip").is_visible()
    assert height - 40 < bottom <= height


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
