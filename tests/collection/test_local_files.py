"""Local files: every format gives the same rows, plain or packed, and each unreadable one is named with its remedy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from collection.datasets import resolve
from groundwork.errors import ConfigurationError

Write = Callable[..., Path]
TEXTS = ["plain", "sea\u2028shore\u0085bound", "naïve 🙂", 'with "quotes", commas', "NA"]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.compress(content[:50]) + zstandard.compress(content[50:]),
}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


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


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_json_lines_are_read_like_plain_ones(tmp_path: Path, write_texts: Write, packing: str) -> None:
    plain = write_texts(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / f"b.jsonl{packing}"
    packed.write_bytes(PACKERS[packing](plain.read_bytes()))
    [source] = resolve(str(packed))
    assert source.name == "b"
    assert [row.text for row in source.read()] == TEXTS
    [both] = resolve(f"both={tmp_path}")
    assert [row.key for row in both.read()] == [f"{name}#{n}" for name in (plain.name, packed.name) for n in range(5)]


def test_text_column_is_found_where_it_is_the_only_one_of_strings(tmp_path: Path, write_texts: Write) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS, column="body")
    [source] = resolve(f"mine={path}")
    assert [row.text for row in source.read()] == TEXTS
    assert source.name == "mine"
    assert source.facts["text_field"] == "body"


@pytest.mark.parametrize(
    ("column", "turns"),
    [
        ("messages", [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho.", "tool": {"x": 1}}]),
        ("conversations", [{"from": "user", "value": "Hi."}, {"from": "assistant", "value": "Ho."}]),
    ],
)
def test_a_conversation_is_written_out_turn_by_turn(tmp_path: Path, column: str, turns: list[dict[str, str]]) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines({"id": "1", "kind": "x", column: turns}, {"id": "2", "kind": "y", column: None}))
    [source] = resolve(str(path))
    assert [row.text for row in source.read()] == ["user: Hi.\n\nassistant: Ho.", ""]
    assert source.facts["text_field"] == column


def test_several_string_columns_are_refused_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "x", "body": "y", "n": 3}\n')
    [source] = resolve(str(path))
    with pytest.raises(ConfigurationError, match=r"a\.jsonl: has no column 'text'.*title, body, n; rename"):
        list(source.read())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"can not be read as \.jsonl \(line 2 is no JSON object\); repair"),
        ("a.jsonl", b'{"text": "ok"}\n\n[1]\n', r"can not be read as \.jsonl \(line 3 is no JSON object\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "o"}\n' * 99_999 + b'{"text'), r"\(line 100000 is no JSON object\)"),
        ("a.parquet", b"PAR1 but no more PAR1", r"can not be read as \.parquet"),
        ("a.txt", b"good\nbad \xff\n", r"byte 9 \(0xff, line 2\) is not UTF-8"),
        ("a.csv", "text\nnäher\n".encode("latin-1"), r"byte 6 \(0xe4, line 2\) is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b"good\nbad \xff\n"), r"byte 9 \(0xff, line 2\) is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines("cut off"))[:-9], r"is damaged or cut off \(EOFError"),
        ("a.jsonl.gz", lines({"text": "not packed"}), r"is damaged or cut off \(BadGzipFile"),
        ("a.jsonl.zst", zstandard.compress(lines("cut off"))[:-3], r"cut off \(EOFError: the last frame has no end"),
        ("a.jsonl.zst", lines({"text": "not packed"}), r"is damaged or cut off \(ZstdError"),
        ("[a].jsonl.gz", gzip.compress(lines("x")), "has brackets or '::' in its path, so it is not unpacked; rename"),
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


@pytest.mark.parametrize("name", ["a.pdf", "a.json", "a.gz", "a.txt.gz"])
def test_a_suffix_that_is_none_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigurationError, match=rf"{name}: is not a \.jsonl, \.parquet, \.csv, \.txt, .* file"):
        resolve(str(tmp_path / name))


def test_a_named_folder_of_several_formats_or_of_none_is_refused(tmp_path: Path, write_texts: Write) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no \.jsonl"):
        resolve(f"mine={tmp_path}")
    for name in ("a.jsonl", "b.csv"):
        write_texts(tmp_path / name, TEXTS)
    with pytest.raises(ConfigurationError, match="holds files of several kinds; give a folder of one kind for mine="):
        resolve(f"mine={tmp_path}")


def test_reading_asks_nothing_of_the_network(
    tmp_path: Path, write_texts: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[object] = []

    def refuse(address: object, *_: object, **__: object) -> None:
        addresses.append(address)
        raise OSError("no network here")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", refuse)
    for suffix in (".jsonl", ".txt", ".csv", ".parquet"):
        [source] = resolve(str(write_texts(tmp_path / f"a{suffix}", TEXTS)))
        assert len(list(source.read())) == len(TEXTS)
    assert not addresses


def test_reading_leaves_the_library_as_it_was(tmp_path: Path, write_texts: Write) -> None:
    from datasets import config
    from datasets.utils import logging

    before = logging.get_verbosity(), config.STREAMING_READ_MAX_RETRIES
    [first], [second] = (resolve(str(write_texts(tmp_path / name, TEXTS))) for name in ("a.jsonl", "b.jsonl"))
    one, other = first.read(), second.read()
    assert next(one).text == next(other).text == TEXTS[0]
    assert (logging.get_verbosity(), config.STREAMING_READ_MAX_RETRIES) == before
