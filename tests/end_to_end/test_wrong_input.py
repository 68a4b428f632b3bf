"""Wrong input gives one clear sentence and exit code 2, and loses nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["some text"], 300).save_pretrained(folder)
    return folder


def _collect(model_dir, texts, tmp_path, **changes):
    given = {
        "model": model_dir,
        "datasets": texts / "prose.jsonl",
        "target_traces": 4,
        "max_length": 64,
        "output_dir": tmp_path / "run",
        **changes,
    }
    return "collect", *(word for name, value in given.items() for word in (f"--{name}", value))


def _refused(command, arguments, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such/folder"}, "no/such/folder: no such folder"),
        ({"datasets": "no_such_set"}, "no_such_set"),
        ({"datasets": "no/such/file.jsonl"}, "no/such/file.jsonl"),
        ({"shard_size_mb": 0}, "--shard_size_mb 0: must be above 0"),
        ({"target_traces": 0}, "--target_traces 0"),
        ({"store": "weights,wieghts"}, "wieghts"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_collect_refuses(changes, message, model_dir, texts, tmp_path, command, capsys):
    assert message in _refused(command, _collect(model_dir, texts, tmp_path, **changes), capsys)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", "gr\u00fc\u00df".encode("latin-1"), "UTF-8"),
        ("a.jsonl", b"{}\n", "a.jsonl"),
    ],
)
def test_collect_refuses_a_text_file_that_is(name, content, message, model_dir, texts, tmp_path, command, capsys):
    (tmp_path / name).write_bytes(content)
    arguments = _collect(model_dir, texts, tmp_path, datasets=tmp_path / name)
    assert message in _refused(command, arguments, capsys)


def test_collect_refuses_a_dense_model(dense_model, texts, tmp_path, command, capsys):
    assert "dense" in _refused(command, _collect(dense_model, texts, tmp_path), capsys)


def test_collect_refuses_a_folder_with_content_and_keeps_it(model_dir, texts, tmp_path, command, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert "--resume" in _refused(command, _collect(model_dir, texts, tmp_path), capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("verb", ["train", "evaluate", "report", "verify"])
def test_a_shard_folder_that_is_none_is_refused(verb, tmp_path, command, capsys):
    (tmp_path / "notes.txt").write_text("no shards here")
    given = {
        "train": ("--shard_dir", tmp_path, "--predictor", "markov", "--output_dir", tmp_path / "out"),
        "evaluate": ("--shard_dir", tmp_path),
        "report": ("--shard_dir", tmp_path, "--output", tmp_path / "report.html"),
        "verify": (tmp_path,),
    }
    assert str(tmp_path) in _refused(command, (verb, *given[verb]), capsys)


def test_an_unknown_predictor_is_refused_with_the_known_ones(run_dir, tmp_path, command, capsys):
    arguments = ("train", "--shard_dir", run_dir, "--predictor", "oracle", "--output_dir", tmp_path / "out")
    error = _refused(command, arguments, capsys)
    assert "oracle" in error
    assert "interlayer" in error


def test_a_predictor_folder_that_is_none_is_refused(run_dir, tmp_path, command, capsys):
    error = _refused(command, ("evaluate", "--shard_dir", run_dir, "--predictor_dir", tmp_path), capsys)
    assert str(tmp_path) in error


def test_an_unknown_split_is_refused(run_dir, command, capsys):
    assert "tset" in _refused(command, ("evaluate", "--shard_dir", run_dir, "--split", "tset"), capsys)
