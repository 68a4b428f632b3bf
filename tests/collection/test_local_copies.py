"""`--dataset_root`: the registered names out of local files, and out of copies of the hub's repositories."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collection.datasets import resolve
from collection.registry import HUB, MIXES
from collection.sampling import draw
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from moe.load import load_tokenizer

Write = Callable[..., Path]
SHARED = Path(__file__).resolve().parents[2] / "../shared/text"


def write_split(folder: Path, columns: dict[str, list[str]], split: str = "train", files: int = 2) -> None:
    """Write a split as the hub's Parquet layout has it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    for part in range(files):
        share = table.slice(part * len(table) // files, (part + 1) * len(table) // files - part * len(table) // files)
        pq.write_table(share, folder / f"{split}-{part:05}-of-{files:05}.parquet")


def texts_of(names: str, root: Path) -> list[str]:
    [source] = resolve(names, root)
    return [row.text for row in source.read()]


def test_a_file_of_the_name_is_read_with_the_columns_of_the_registered_set(tmp_path: Path, write_texts: Write) -> None:
    path = tmp_path / "amazon_polarity.parquet"
    pq.write_table(pa.table({"label": [1], "title": ["short"], "content": ["the text"]}), path)
    [source] = resolve("amazon_polarity", tmp_path)
    assert [row.text for row in source.read()] == ["the text"]
    assert source.facts == {
        "name": "amazon_polarity",
        "location": str(path),
        "licence": "apache-2.0",
        "text_field": "content",
    }
    write_texts(tmp_path / "gsm8k.jsonl", ["one column instead"])
    assert texts_of("gsm8k", tmp_path) == ["one column instead"]


@pytest.mark.parametrize("name", HUB)
def test_a_copy_of_the_repository_is_read_for_every_registered_set(tmp_path: Path, name: str) -> None:
    entry = HUB[name]
    columns = {field: [f"{field} {number}" for number in range(5)] for field in entry.text_fields}
    wanted = ["\n\n".join(f"{field} {number}" for field in entry.text_fields) for number in range(5)]
    others = {field: ["another split or configuration"] for field in entry.text_fields}
    folder = tmp_path / entry.repository / (entry.config or "data")
    write_split(folder, columns, entry.split)
    write_split(folder, others, "test")
    if entry.config:
        write_split(tmp_path / entry.repository / "other", others, entry.split)
    assert texts_of(name, tmp_path) == wanted
    (tmp_path / entry.repository).rename(tmp_path / name)
    assert texts_of(name, tmp_path) == wanted


def test_a_copy_that_lacks_a_file_of_the_split_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "stanfordnlp" / "imdb" / "plain_text"
    write_split(folder, {"text": ["a", "b", "c"]}, files=3)
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ConfigurationError, match=r"of split 'train' there are train-00000-of.*wanted are 3 files"):
        resolve("imdb", tmp_path)


def test_a_copy_with_the_split_in_several_folders_is_refused(tmp_path: Path) -> None:
    for config in ("one", "two"):
        write_split(tmp_path / "imdb" / config, {"text": ["a", "b"]})
    with pytest.raises(ConfigurationError, match=r"holds split 'train' in .*one, .*two; keep one of them there"):
        resolve("imdb", tmp_path)


def test_other_folders_are_read_whole_and_other_names_are_found_too(tmp_path: Path, write_texts: Write) -> None:
    (tmp_path / "dolly_15k").mkdir()
    row = {"instruction": "Do.", "context": "", "response": "Done."}
    (tmp_path / "dolly_15k" / "databricks-dolly-15k.jsonl").write_text(json.dumps(row) + "\n")
    assert texts_of("dolly_15k", tmp_path) == ["Do.\n\nDone."]
    write_texts(tmp_path / "mine.txt", ["x"])
    assert texts_of("mine", tmp_path) == ["x"]


def test_what_is_missing_is_named_with_the_places_that_were_looked_at(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"holds no imdb \(imdb\.jsonl, .*or a folder imdb or stanfordnlp/imdb"
    ):
        resolve("imdb", tmp_path)
    with pytest.raises(ConfigurationError, match="no such folder; name the one with the data sets"):
        resolve("imdb", tmp_path / "gone")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared texts beside the project")
def test_the_default_mix_is_drawn_from_a_stand_in_of_real_texts(
    tmp_path: Path, make_settings: Callable[..., CollectSettings], model_dir: Path
) -> None:
    stand_ins = ("imdb", "yelp", "ag_news", "squad", "web", "wikipedia", "dialogue", "wikitext")
    for name, file in zip(MIXES["default"], stand_ins, strict=True):
        with (SHARED / f"{file}.jsonl").open() as lines:
            texts = [json.loads(line)["text"] for line in islice(lines, 150)]
        entry = HUB[name]
        repeated = texts * 3 if name == "squad" else texts  # as its paragraphs are, once for each question
        write_split(tmp_path / entry.repository / (entry.config or name), {entry.text_fields[0]: repeated})
    with (SHARED / "gsm8k.jsonl").open() as lines:
        (tmp_path / "gsm8k.jsonl").write_text("".join(islice(lines, 300)))
    settings = make_settings(target_traces=400, min_tokens=20, max_length=48)
    draws = draw(resolve("default,gsm8k:2", tmp_path), load_tokenizer(str(model_dir)), settings)
    given = {each.source.name: len(each.sequences) for each in draws}
    assert given == {**dict.fromkeys(MIXES["default"], 40), "gsm8k": 80}
    skipped = {each.source.name: each.skipped for each in draws}
    assert skipped["squad"]["duplicate"] > 0
