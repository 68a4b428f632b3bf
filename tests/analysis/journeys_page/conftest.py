"""A report of six sequences whose journeys are opened once for the tests of a file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from analysis.report import write_report
from speculation.predictor import Predictor, create
from traces.reader import TraceDataset

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    OpenPage = Callable[..., Page]

WORDS = ("The", " cat", " sat", " on", " the", " mat", ".", "\n")

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


def token(page: "Page", number: int) -> "Locator":
    return page.locator(f'#journey-tokens [data-token="{number}"]')


def shared(a: dict[str, Any], token_a: int, b: dict[str, Any], token_b: int) -> list[int]:
    return [
        len(set(one) & set(other))
        for one, other in zip(a["expert_ids"][token_a], b["expert_ids"][token_b], strict=True)
    ]
