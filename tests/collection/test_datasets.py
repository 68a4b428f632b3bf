"""`--datasets`: what names stand for, how rows are read, and what each wrong input is told."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collection.datasets import InstalledSource, require_utf8, resolve
from collection.installed import KINDS, read_installed
from collection.registry import HUB, MIXES
from groundwork.errors import ConfigurationError

Write = Callable[..., Path]
TEXTS = ["plain", "sea\u2028shore\u0085bound", "naïve 🙂", 'with "quotes", commas', "NA"]


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's address be a port of this machine where nobody answers."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows_with_keys_that_find_them_again(
    tmp_path: Path, write_texts: Write, suffix: str
) -> None:
    [source] = resolve(str(write_texts(tmp_path / f"some[1]{suffix}", TEXTS)))
    write_texts(tmp_path / f"some1{suffix}", ["what a pattern would match"])
    rows = list(source.read())
    assert [row.text for row in rows] == TEXTS
    assert [row.key for row in rows] == [f"some[1]{suffix}#{number}" for number in range(len(TEXTS))]
    assert source.name == "some[1]"


def test_text_column_is_found_where_it_is_the_only_one_of_strings(tmp_path: Path, write_texts: Write) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS, column="body")
    [source] = resolve(f"mine={path}")
    assert [row.text for row in source.read()] == TEXTS
    assert source.name == "mine"
    assert source.facts["text_field"] == "body"


def test_several_string_columns_are_refused_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "x", "body": "y", "n": 3}\n')
    [source] = resolve(str(path))
    with pytest.raises(ConfigurationError, match=r"a\.jsonl: has no column 'text'.*title, body, n; rename"):
        list(source.read())


def test_a_folder_is_one_source_for_each_file_and_a_single_one_under_a_name(tmp_path: Path, write_texts: Write) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_texts(tmp_path / name, TEXTS)
    assert [source.name for source in resolve(str(tmp_path))] == ["a", "b"]
    [source] = resolve(f"both={tmp_path}")
    rows = list(source.read())
    assert [row.number for row in rows] == list(range(2 * len(TEXTS)))
    assert rows[len(TEXTS)].key == "b.jsonl#0"


def test_mixes_stand_for_their_members() -> None:
    assert [source.name for source in resolve("default,tables")] == [*HUB, "tables"]
    assert len(MIXES["installed"]) == len(MIXES["default"]) == 8


def test_dataset_root_serves_registered_names_with_their_own_text_column(tmp_path: Path) -> None:
    path = tmp_path / "amazon_polarity.parquet"
    pq.write_table(pa.table({"label": [1], "title": ["short"], "content": ["the text"]}), path)
    [source] = resolve("amazon_polarity", tmp_path)
    assert [row.text for row in source.read()] == ["the text"]
    assert source.facts["licence"] == "apache-2.0"
    with pytest.raises(ConfigurationError, match=r"holds no imdb \(imdb\.jsonl"):
        resolve("imdb", tmp_path)


def test_a_hub_out_of_reach_is_refused_at_once_with_the_offline_way(closed_hub: None) -> None:
    [source] = resolve("imdb")
    with pytest.raises(ConfigurationError, match=r"'imdb': the hub gives no stanfordnlp/imdb.*--dataset_root"):
        next(source.read())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "wikipedia",
            "--datasets wikipedia: unknown data set; known are mixes installed, default; .*python_code.*imdb",
        ),
        ("gone.jsonl", "no such file or folder as 'gone.jsonl'"),
        ("mine=gone", "no such file or folder as 'gone'"),
        (" , ", "names no data set"),
        ("a b=x.txt", "'a b' is no name"),
        ("tables,tables", "2 data sets are called 'tables'"),
    ],
)
def test_wrong_names_are_refused_in_one_sentence(names: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"can not be read as \.jsonl"),
        ("a.parquet", b"PAR1 but no more PAR1", r"can not be read as \.parquet"),
        ("a.txt", b"good\nbad \xff\n", r"byte 9 \(0xff, line 2\) is not UTF-8"),
        ("a.csv", "text\nnäher\n".encode("latin-1"), r"byte 6 \(0xe4, line 2\) is not UTF-8"),
    ],
)
def test_unreadable_files_are_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(content)
    [source] = resolve(str(tmp_path / name))
    with pytest.raises(ConfigurationError, match=message) as caught:
        list(source.read())
    assert str(tmp_path / name) in str(caught.value)
    assert not caplog.records


def test_a_suffix_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match=r"a\.pdf: is not a \.jsonl, \.parquet, \.csv, \.txt file"):
        resolve(str(tmp_path / "a.pdf"))


def test_utf8_is_checked_across_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lead = b"a\n" * (1 << 19)
    path.write_bytes(lead[:-1] + "é".encode() + b"\n\x80")
    with pytest.raises(ConfigurationError, match=rf"byte {len(lead) + 2} \(0x80, line {(1 << 19) + 1}\)"):
        require_utf8(path)
    path.write_bytes(lead[:-1] + "é".encode()[:1])
    with pytest.raises(ConfigurationError, match=rf"byte {len(lead) - 1} \(0xc3"):
        require_utf8(path)


@pytest.mark.parametrize("kind", KINDS)
def test_installed_texts_are_there_and_in_a_fixed_order(kind: str) -> None:
    beginnings = []
    for _ in range(2):
        rows = InstalledSource(kind).read()
        beginnings.append([next(rows) for _ in range(40)])
    assert beginnings[0] == beginnings[1]
    assert all(row.text.strip() for row in beginnings[0])
    assert len({row.key for row in beginnings[0]}) == 40


def test_an_unknown_kind_of_installed_text_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'poems' is unknown; known kinds: python_code"):
        next(read_installed("poems"))
