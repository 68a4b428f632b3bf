"""Tokens followed and compared: their paths, the experts that two of them share, and the share that was guessed."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from .conftest import place, shared, token

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


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
