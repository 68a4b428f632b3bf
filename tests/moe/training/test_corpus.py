import json

import numpy as np
import pytest

from groundwork.errors import ConfigurationError
from moe.training.corpus import read_corpus, training_rows


def _jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def test_the_split_is_by_text_so_that_a_duplicate_stays_on_one_side(tmp_path):
    texts = [f"document {number}" for number in range(2000)]
    corpus = read_corpus([_jsonl(tmp_path / "a.jsonl", texts + texts[:100])])
    assert not set(corpus.train["a"]) & set(corpus.held_out["a"])
    assert len(corpus.train["a"]) + len(corpus.held_out["a"]) == 2100
    assert 0.01 < len(corpus.held_out["a"]) / 2100 < 0.035


def test_line_separators_inside_a_text_do_not_split_its_line(tmp_path):
    text = "one\u2028two\x85three\x0cfour"
    corpus = read_corpus([_jsonl(tmp_path / "a.jsonl", [text])])
    assert [*corpus.train.get("a", []), *corpus.held_out.get("a", [])] == [text]


def test_each_target_token_of_an_epoch_occurs_once():
    documents = [np.arange(start, start + 7, dtype=np.int32) for start in range(0, 700, 7)]
    rows = training_rows(documents, 8, seed=0, epoch=0)
    targets = rows[:, 1:].ravel()
    assert len(targets) == len(set(targets)) == (700 - 1) // 8 * 8


def test_epochs_differ_and_repeat_exactly_under_one_seed():
    documents = [np.arange(start, start + 7, dtype=np.int32) for start in range(0, 700, 7)]
    first, again, next_epoch = (training_rows(documents, 8, seed=3, epoch=epoch) for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, next_epoch)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', r"a\.jsonl, line 2: not an object with a \"text\" string"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: not an object with a \"text\" string"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: not an object with a \"text\" string"),
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 at byte 3"),
        ("a.txt", b"  \n", r"no text found"),
        ("a.pdf", b"x", r"a\.pdf: not a folder or a \.jsonl or \.txt file"),
    ],
)
def test_unusable_text_is_refused_by_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_corpus([tmp_path / name])
