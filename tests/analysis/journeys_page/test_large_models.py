"""Journeys of many experts, and of as many tokens and layers as the page shows: complete and without lag."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from analysis.report import write_report
from speculation.predictor import create
from traces.reader import TraceDataset

from .conftest import WORDS, place

if TYPE_CHECKING:
    from playwright.sync_api import Page

    OpenPage = Callable[..., Page]

pytestmark = pytest.mark.browser

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
