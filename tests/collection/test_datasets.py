"""`--datasets`: what names stand for, what a weight is, and what each wrong list is told."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from collection.datasets import resolve
from collection.installed import KINDS, read_installed
from collection.registry import HUB, MIXES
from collection.sources import InstalledSource
from groundwork.errors import ConfigurationError

Write = Callable[..., Path]
TEXTS = ["one", "two"]


def test_mixes_stand_for_their_members() -> None:
    assert [source.name for source in resolve("default,tables")] == [*MIXES["default"], "tables"]
    assert len(MIXES["installed"]) == len(MIXES["default"]) == 8
    for mix in ("reasoning", "code", "dialogue"):
        sources = resolve(mix)
        assert [source.name for source in sources] == list(MIXES[mix])
        assert all(source.facts["location"].startswith("https://huggingface.co/datasets/") for source in sources)
    assert sorted(name for mix in list(MIXES)[1:] for name in MIXES[mix]) == sorted(HUB)


def test_a_folder_is_one_source_for_each_file_and_a_single_one_under_a_name(tmp_path: Path, write_texts: Write) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_texts(tmp_path / name, TEXTS)
    assert [source.name for source in resolve(str(tmp_path))] == ["a", "b"]
    [source] = resolve(f"both={tmp_path}")
    assert [row.key for row in source.read()] == ["a.jsonl#0", "a.jsonl#1", "b.jsonl#0", "b.jsonl#1"]
    assert [row.number for row in source.read()] == [0, 1, 2, 3]


def test_a_weight_is_that_of_each_source_its_item_stands_for(tmp_path: Path, write_texts: Write) -> None:
    write_texts(tmp_path / "a.jsonl", TEXTS)
    sources = resolve(f"reasoning:2,tables,mine={tmp_path}/a.jsonl:0.5,{tmp_path}/a.jsonl:.25")
    assert {source.name: source.weight for source in sources} == {
        **dict.fromkeys(MIXES["reasoning"], Fraction(2)),
        "tables": 1,
        "mine": Fraction(1, 2),
        "a": Fraction(1, 4),
    }
    assert [source.facts.get("weight") for source in sources[2:]] == [2.0, None, 0.5, 0.25]


def test_only_a_number_at_the_very_end_is_a_weight(
    tmp_path: Path, write_texts: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs:2", "c:"):
        Path(folder).mkdir()
        write_texts(Path(folder) / "a.jsonl", TEXTS)
    write_texts(Path("notes:2.txt"), TEXTS)
    for item, weight, location in (
        ("x=runs:2/", 1, "runs:2/"),
        ("x=runs:2:3", 3, "runs:2"),
        ("x=runs:2/a.jsonl:3", 3, "runs:2/a.jsonl"),
        ("notes:2.txt", 1, "notes:2.txt"),
        ("c:/a.jsonl", 1, "c:/a.jsonl"),
    ):
        [source] = resolve(item)
        assert (source.weight, source.facts["location"]) == (weight, location), item


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "wikipedia",
            "--datasets wikipedia: unknown data set; known are mixes installed, default, reasoning, code, dialogue; "
            ".*python_code.*imdb.*gsm8k",
        ),
        ("gone.jsonl", "no such file or folder as 'gone.jsonl'"),
        ("mine=gone", "no such file or folder as 'gone'"),
        (" , ", "names no data set"),
        ("a b=x.txt", "'a b' is no name"),
        ("mine=", "--datasets mine=: names no path; give NAME=PATH"),
        (f"mine={__file__}:-1", f"no such file or folder as '{__file__}:-1'; a weight is a decimal number above 0"),
        ("tables,tables", "2 data sets are called 'tables'; leave one out, or .* NAME=PATH; to weigh one member"),
        ("tables:2,installed", "2 data sets are called 'tables'"),
        ("imdb:0", "--datasets imdb:0: a weight of 0 asks for nothing; raise it, or leave imdb out"),
        ("imdb:-1", "--datasets imdb:-1: unknown data set; .* with :WEIGHT behind it or without"),
        ("imdb:much", "--datasets imdb:much: unknown data set"),
    ],
)
def test_wrong_names_are_refused_in_one_sentence(names: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(names)


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
