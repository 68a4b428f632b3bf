"""Journeys by keyboard, and the search through their texts."""

import re
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import place, token

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


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


def status(page: "Page") -> str:
    return page.locator("#journey-status").inner_text()


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
