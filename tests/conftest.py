"""Settings of all tests, and a watched browser for those that open a page.

A busy machine must not fail a property; hangs are pytest-timeout's business.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

READY_MS = 30_000  # for a page to draw itself on a busy machine
EMPTY_FIGURES = """async () => {
  const drawn = (place) => [...place.querySelectorAll(".trace, .heatmaplayer image, .shapelayer path, .bars path")]
    .some((mark) => { const box = mark.getBoundingClientRect(); return box.width > 1 && box.height + box.width > 2; });
  const empty = [];
  for (const place of document.querySelectorAll("[data-figure]")) {
    for (let tries = 0; tries < 500; tries++) {
      if (tries % 25 === 0) place.scrollIntoView({ behavior: "instant" });  // again, for the page may have grown
      if (drawn(place)) break;
      await new Promise((go) => setTimeout(go, 20));
    }
    if (!drawn(place)) empty.push(place.dataset.figure);
  }
  return empty;
}"""


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: packed ones hold the time, and all test processes must name their tests alike."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `gpus(*free)`, which lets torch say that there are GPUs with so many free bytes; none can be used."""
    import torch

    def pretend(*free: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], free[device.index]))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(name=f"Card {device.index}", total_memory=free[device.index]),
        )

    return pretend


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's chromium; tests that ask for it are skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine; 'make browser' installs Debian's")
    return found


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of other tests'
def browser(chromium: str) -> "Iterator[Browser]":
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; 'pip install -e .[dev] -c constraints.txt' does it"
    )
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: "Browser") -> "Iterator[Callable[..., Page]]":
    """Returns a function that opens a file as a page and waits until it is drawn; options are the browser context's.

    The test fails if a page wrote an error or warning to the console, threw, asked for anything but its own file, or
    holds a figure in which nothing is drawn.
    """
    yield from watched(browser)


@pytest.fixture(scope="module")
def open_page_once(browser: "Browser") -> "Iterator[Callable[..., Page]]":
    """The same for a page that the tests of a file go through together; the last of them has the complaints."""
    yield from watched(browser)


def watched(browser: "Browser") -> "Iterator[Callable[..., Page]]":
    """Yield what opens pages, then fail for all that was wrong with them."""
    pages: list[Page] = []
    complaints: list[str] = []

    def open_(file: Path, **options: Any) -> "Page":
        options = {"viewport": {"width": 1400, "height": 1000}} | options
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(READY_MS)
        page.on(
            "console", lambda said: complaints.append(said.text) if said.type in ("error", "warning", "trace") else None
        )
        page.on("pageerror", lambda error: complaints.append(f"thrown: {error}"))
        page.on(
            "request", lambda sent: complaints.append(f"request: {sent.url}") if sent.url != file.as_uri() else None
        )
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(file.as_uri())
        page.locator("html[data-ready]").wait_for(state="attached")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        complaints += [f"nothing drawn in figure {key}" for key in page.evaluate(EMPTY_FIGURES)]
        page.context.close()
    assert not complaints, "\n".join(dict.fromkeys(complaints))
