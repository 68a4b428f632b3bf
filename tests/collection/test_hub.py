"""The hub, stood in for by a server of this process that the real client libraries read from."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from collection import hub
from collection.datasets import keep_revisions
from collection.hub import HubSource
from collection.registry import HubDataset
from groundwork.errors import ConfigurationError, ExpertSpeculationError

OLD, NEW = "a" * 40, "b" * 40
ENTRY = HubDataset("owner/set", ("question", "answer"), "mit", "main")
TEXTS = {
    revision: [f"question {number} of {mark}\n\nanswer {number}" for number in range(700)]
    for revision, mark in ((OLD, "old"), (NEW, "new"))
}
TEMPLATES = {
    "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": "/{repo_id}/resolve/{revision}/{filename}",
    "datasets.config.HUB_DATASETS_URL": "/datasets/{repo_id}/resolve/{revision}/{path}",
}
CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"


@dataclass
class Hub:
    """A repository as the hub serves it: `head` is its newest commit, `answer(path, times)` a status to fail with."""

    folder: Path
    head: str = OLD
    answer: Callable[[str, int], int] = lambda path, times: 200
    requests: Counter[str] = field(default_factory=Counter)

    def respond(self, path: str) -> tuple[int, bytes]:
        self.requests[path] += 1
        status = self.answer(path, self.requests[path])
        if status != 200:
            return status, b""
        if path == "/api/datasets/owner/set":
            return 200, json.dumps(self._info(self.head)).encode()
        for start, reply in (
            ("/api/datasets/owner/set/revision/", self._reply_info),
            ("/api/datasets/owner/set/tree/", self._reply_tree),
            ("/datasets/owner/set/resolve/", self._reply_file),
        ):
            if path.startswith(start):
                return reply(*path.removeprefix(start).partition("/")[::2])
        return 404, b""

    def _info(self, revision: str) -> dict[str, Any]:
        files = sorted(path for path in (self.folder / revision).rglob("*") if path.is_file())
        names = [{"rfilename": path.relative_to(self.folder / revision).as_posix()} for path in files]
        return {"id": "owner/set", "sha": revision, "siblings": names, "tags": [], "downloads": 0, "likes": 0}

    def _reply_info(self, revision: str, _: str) -> tuple[int, bytes]:
        return 200, json.dumps(self._info(revision)).encode()

    def _reply_tree(self, revision: str, inside: str) -> tuple[int, bytes]:
        root = self.folder / revision
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "oid": "c" * 40,
                "size": path.stat().st_size,
                "path": path.relative_to(root).as_posix(),
            }
            for path in sorted((root / inside).glob("*"))
        ]
        return 200, json.dumps(entries).encode()

    def _reply_file(self, revision: str, name: str) -> tuple[int, bytes]:
        path = self.folder / revision / name
        return (200, path.read_bytes()) if path.is_file() else (404, b"")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        served: Hub = self.server.hub  # type: ignore[attr-defined]
        status, body = served.respond(self.path.partition("?")[0])
        revision = NEW if NEW in self.path else OLD
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X-Repo-Commit": revision,
            "Content-Type": "application/json",
        }
        if status == 403:
            headers["X-Error-Code"] = "GatedRepo"
        if status == 200 and (wanted := self.headers.get("Range")):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve two commits of a set in two files each, and let the client libraries take this for the hub."""
    for revision, texts in TEXTS.items():
        folder = tmp_path / "repository" / revision
        (folder / "main").mkdir(parents=True)
        (folder / "README.md").write_text(CARD)
        for part in range(2):
            questions, answers = zip(*(text.split("\n\n") for text in texts[part * 400 :][:400]), strict=True)
            table = pa.table({"question": questions, "answer": answers, "n": [1] * len(questions)})
            pq.write_table(table, folder / "main" / f"train-0000{part}-of-00002.parquet", row_group_size=150)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hub = Hub(tmp_path / "repository")  # type: ignore[attr-defined]
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        for setting in ("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "datasets.config.HUB_DATASETS_URL"):
            monkeypatch.setattr(setting, address + TEMPLATES[setting])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.hub  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def texts_of(source: HubSource) -> list[str]:
    rows = list(source.read())
    assert [row.key for row in rows] == [f"train#{number}" for number in range(len(rows))]
    return [row.text for row in rows]


def test_a_set_is_streamed_and_what_was_read_is_stated(served: Hub) -> None:
    source = HubSource("mine", ENTRY)
    assert texts_of(source) == TEXTS[OLD]
    assert source.facts == {
        "name": "mine",
        "location": "https://huggingface.co/datasets/owner/set",
        "licence": "mit",
        "revision": OLD,
        "config": "main",
        "split": "train",
        "text_field": "question + answer",
    }


def test_a_source_stays_at_the_revision_that_it_was_first_read_at(served: Hub) -> None:
    source = HubSource("mine", ENTRY)
    first = texts_of(source)
    served.head = NEW
    assert texts_of(source) == first
    assert texts_of(HubSource("mine", ENTRY)) == TEXTS[NEW]


def test_a_saved_plan_says_at_which_revision_its_sources_are_read(served: Hub) -> None:
    served.head = NEW
    source, other = HubSource("mine", ENTRY), HubSource("other", ENTRY)
    keep_revisions([source, other], [{"name": "mine", "revision": OLD}, {"name": "file"}])
    assert texts_of(source) == TEXTS[OLD]
    assert texts_of(other) == TEXTS[NEW]


@pytest.mark.parametrize(
    "failing", ["/set", "/README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
)
def test_a_stream_that_breaks_is_taken_up_without_losing_or_repeating_rows(
    served: Hub, failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # 520 is what a proxy before the hub answers; the client library does not retry it by itself.
    served.answer = lambda path, times: 520 if times <= 2 and path.endswith(failing) else 200
    assert texts_of(HubSource("mine", ENTRY)) == TEXTS[OLD]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("; ")[2] for line in lines] == [f"retry {number} of 5 in 0 s" for number in (1, 2)]
    assert all(line.startswith("data set 'mine': the hub failed at row ") for line in lines)


def test_a_cached_copy_of_another_revision_is_never_read_instead(served: Hub) -> None:
    assert load_dataset("owner/set", "main", split="train", revision=OLD).num_rows == 700
    served.head = NEW
    served.answer = lambda path, times: 520 if times <= 2 and path.endswith("/README.md") else 200
    assert texts_of(HubSource("mine", ENTRY)) == TEXTS[NEW]


def test_a_local_folder_of_the_repository_s_name_is_not_taken_for_the_hub(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"the folder owner/set lies in the current one .*--dataset_root \."):
        texts_of(HubSource("mine", ENTRY))


def test_the_number_of_retries_is_bounded_and_the_last_failure_reported(
    served: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    served.answer = lambda path, times: 520 if "train-00001" in path else 200
    given: list[str] = []
    with pytest.raises(ExpertSpeculationError, match=r"failed 6 times at row \d+ .*520.*--dataset_root") as caught:
        given.extend(row.text for row in HubSource("mine", ENTRY).read())
    assert not isinstance(caught.value, ConfigurationError)
    assert len(capsys.readouterr().err.splitlines()) == 5
    assert 0 < len(given) <= 400


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"owner/set is gated; accept its terms at https://huggingface.co/datasets/owner/set and log in"),
        (404, r"the hub answers 404 for owner/set; put mine\.jsonl into a folder"),
    ],
)
def test_what_another_try_would_meet_again_is_refused_at_once(
    served: Hub, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served.answer = lambda path, times: status if path.endswith((".parquet", ".md", "/set")) else 200
    with pytest.raises(ConfigurationError, match=message):
        texts_of(HubSource("mine", ENTRY))
    assert capsys.readouterr().err == ""


def test_a_set_whose_files_only_are_gated_is_told_apart_from_a_missing_one(served: Hub) -> None:
    served.answer = lambda path, times: 403 if "/resolve/" in path else 200
    with pytest.raises(ConfigurationError, match=r"owner/set is gated; .*'hf auth login', or put mine\.jsonl"):
        texts_of(HubSource("mine", ENTRY))


def test_a_set_that_lost_its_column_is_refused_with_the_columns_it_has(served: Hub) -> None:
    entry = HubDataset("owner/set", ("question", "solution"), "mit", "main")
    with pytest.raises(ConfigurationError, match="now has the columns question, answer, n, not question and solution"):
        texts_of(HubSource("mine", entry))


@pytest.mark.parametrize("switch", ["huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"])
def test_offline_mode_asks_nothing_of_the_network(served: Hub, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setattr(switch, True)
    with pytest.raises(ConfigurationError, match="_OFFLINE is set, so the hub is not asked; unset it, or put"):
        texts_of(HubSource("mine", ENTRY))
    assert not served.requests


def test_a_hub_out_of_reach_is_refused_at_once_with_the_offline_way(
    served: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match=r"'mine': the hub gives no owner/set \(ConnectError.*--dataset_root"):
        texts_of(HubSource("mine", ENTRY))
    assert capsys.readouterr().err == ""
