"""The written file: complete, valid, harmless whatever the tokens say, and true to the data."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from analysis.page import SCRIPTS, embedded_json, tied
from analysis.report import write_report
from analysis.tokens import readable
from groundwork.errors import ConfigurationError
from speculation.predictor import Predictor
from traces.reader import TraceDataset


class Page(HTMLParser):
    """Collects the tags with their attributes, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


@pytest.fixture(scope="module")
def written(
    dataset: TraceDataset,
    predictors: dict[str, Predictor],
    evaluation: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("report") / "report.html"
    numbers = write_report(dataset, predictors, output, evaluation=evaluation, journeys=6)
    return output.read_text("utf-8"), numbers


def page_data(page: Page) -> dict[str, Any]:
    return dict(json.loads(page.scripts[0]))


def unpacked(script: str) -> str:
    return gzip.decompress(base64.b64decode(script, validate=True)).decode()


def figure_data(page: Page) -> dict[str, Any]:
    return dict(json.loads(unpacked(page.scripts[1])))


def test_hostile_text_appears_only_escaped(written: tuple[str, dict[str, Any]]) -> None:
    html, _ = written
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == len(page.scripts) == 3 + len(SCRIPTS)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for data in (page.scripts[0], unpacked(page.scripts[1])):
        assert "<" not in data
        assert "\\u003c" in data
    assert not set("\x00\x07\x1b\u202e\u2066\u200b") & set(html)
    assert "{{ 7 * 7 }}" in json.dumps(page_data(page)["journeys"])
    labels = [trace.get("hovertemplate", "") for trace in figure_data(page)["figures"]["datasets"]["data"]]
    assert any("&lt;a href" in text for text in labels)
    assert not any("<a" in text for text in labels)  # plotly would make it a link


def test_nothing_is_loaded_from_the_network_and_only_the_pages_own_scripts_may_run(
    written: tuple[str, dict[str, Any]],
) -> None:
    html, _ = written
    page = Page(html)
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert not re.search(r"@import|url\(", html[html.index("<style>") : html.index("</style>")])
    (policy,) = [a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    plotly = unpacked(page.scripts[2])
    assert plotly == get_plotlyjs()
    scripts = [plotly, *page.scripts[3:]]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{d}'" for d in digests))
    assert policy.count("sha256-") == 1 + len(SCRIPTS)
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")


def test_the_numbers_are_those_of_the_data(
    written: tuple[str, dict[str, Any]], dataset: TraceDataset, evaluation: dict[str, Any]
) -> None:
    html, numbers = written
    json.dumps(numbers, allow_nan=False)
    assert (numbers["run"]["num_tokens"], numbers["run"]["num_sequences"]) == (dataset.num_tokens, 60)
    ids = np.concatenate([trace.expert_ids_TLK[:, 1].ravel() for trace in dataset.sequences()])
    share = 100 * np.bincount(ids, minlength=8) / len(ids)
    np.testing.assert_allclose(numbers["figures"]["usage"]["rows"][1][1:], share, atol=0.01)
    for pair in numbers["transitions"]["layers"]:
        np.testing.assert_allclose(np.sum(pair["probability"], axis=1), 1, atol=1e-4)
    for journey in numbers["journeys"]:
        (trace,) = dataset.read([journey["sequence_id"]])
        assert journey["expert_ids"] == trace.expert_ids_TLK.tolist()
        assert journey["tokens"] == [readable(token) for token in trace.tokens_T]
        assert set(journey["guesses"]) == {"markov", "repeat"}
    recall = 100 * evaluation["predictors"]["markov@<b>mine"]["recall"]["2"]["value"]
    assert f"<b>{recall:.1f}</b>" in html
    assert "markov@&lt;b&gt;mine" in html
    assert figure_data(Page(html))["tables"]["usage"]["rows"] == numbers["figures"]["usage"]["rows"]


def test_every_figure_is_a_valid_plotly_figure_with_a_table(written: tuple[str, dict[str, Any]]) -> None:
    data = figure_data(Page(written[0]))
    sections = written[1]["sections"]
    assert list(sections) == [
        *("overview", "usage", "specialisation", "coactivation", "transitions", "locality", "token_classes"),
        *("accuracy", "calibration", "prefetching", "journeys"),
    ]
    shown = [key for section in sections.values() for key in section["figures"]]
    assert len(shown) == len(set(shown))
    assert set(data["figures"]) == set(data["tables"]) == set(written[1]["figures"]) == set(shown)
    for key, spec in data["figures"].items():
        go.Figure(spec)  # raises on any unknown attribute
        assert spec["data"], key
        table = data["tables"][key]
        assert table["rows"], key
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 1, "top_k": 1, "experts": 2, "datasets": ("code",), "store": (), "order": "unknown", "sequences": 3},
        {"layers": 2, "top_k": 3, "experts": 300, "sequences": 4},
    ],
)
def test_small_and_wide_models_without_predictors_say_what_to_run(make_run: Any, shape: Any, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    numbers = write_report(make_run(**shape), {}, output)
    html = output.read_text("utf-8")
    assert "expert-speculation train --shard_dir" in re.sub("</?span>", "", html)
    assert len(numbers["journeys"]) == shape["sequences"]
    assert "information" not in numbers["figures"]  # for want of data sets with enough sequences
    assert "with 8 sequences of each or more, to see how their usage differs" in html


def test_what_is_no_evaluation_or_one_of_another_model_is_refused_in_one_sentence(
    dataset: TraceDataset, evaluation: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "new" / "report.html"
    for wrong, message in (
        (evaluation | {"num_experts": 64}, "num_experts 64, but 8 is needed"),
        (evaluation | {"predictors": {"mine": {}}}, "not what 'expert-speculation evaluate --json' writes"),
        (["no", "mapping"], "not what 'expert-speculation evaluate --json' writes"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            write_report(dataset, {}, output, evaluation=wrong)  # type: ignore[arg-type]
    torn = evaluation | {"horizon": 2, "predictors": {"mine": {}}}
    for wrong, message in (
        ([evaluation, torn], "second.json is not what 'expert-speculation evaluate --json' writes"),
        ([torn, evaluation], "first.json is not what 'expert-speculation evaluate --json' writes"),
        ([evaluation, None], "second.json is not what 'expert-speculation evaluate --json' writes"),
        ([evaluation, evaluation | {"top_k": 3}], "second.json has top_k 3, but 2 is needed"),
        ([evaluation, evaluation | {"horizon": 2, "tokens": 5}], "second.json has tokens 5, first.json "),
        ([evaluation, evaluation], "second.json has the horizon 1, and so has first.json"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            write_report(dataset, {}, output, evaluation=wrong, evaluation_names=["first.json", "second.json"])
    assert not output.exists()
    with pytest.raises(ConfigurationError, match="is a folder"):
        write_report(dataset, {}, tmp_path)


def test_the_same_run_gives_the_same_file_but_for_the_time(dataset: TraceDataset, tmp_path: Path) -> None:
    files = [tmp_path / "a.html", tmp_path / "b.html"]
    for file in files:
        write_report(dataset, {}, file, journeys=2, seed=5)
    first, second = (re.sub(r"Written [\d: UTC-]+ by", "", file.read_text("utf-8")) for file in files)
    assert first == second


def test_no_line_ends_between_a_number_and_its_sign() -> None:
    assert tied("of 12.5 % (q < 0.05; p = 0.1), 3 of 4 % signs") == (
        "of 12.5\xa0% (q\xa0<\xa00.05; p\xa0=\xa00.1), 3 of 4\xa0% signs"
    )


def test_embedded_json_cannot_end_its_script() -> None:
    hostile = "</script><!-- & \u2028"
    assert not set("<>&") & set(embedded_json({"token": hostile}))
    assert json.loads(embedded_json({"token": hostile})) == {"token": hostile}
