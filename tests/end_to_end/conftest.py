"""A small random Mixtral in the published checkpoint layout, texts of two kinds, and the command in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM

from expert_speculation.command import main
from moe.mini import mixtral_config, size
from moe.training.tokenizer import train_tokenizer

WORDS = [
    "the",
    "router",
    "sends",
    "each",
    "token",
    "to",
    "two",
    "of",
    "eight",
    "experts",
    "and",
    "adds",
    "what",
    "they",
    "return",
    "by",
    "weight",
]


def run_command(*arguments) -> int:
    """Run the command as a user would, and return its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


@pytest.fixture
def command():
    return run_command


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-mixtral"
    torch.manual_seed(0)
    model = MixtralForCausalLM(mixtral_config(size("tiny")))
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.mul_(40)
    model.save_pretrained(folder, max_shard_size="200KB")
    train_tokenizer(WORDS * 20, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for name, words in (("prose", WORDS[:9]), ("more", WORDS[9:])):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(120):
                file.write(json.dumps({"text": " ".join(generator.choice(words, 30))}) + "\n")
    return folder


@pytest.fixture(scope="session")
def run_dir(model_dir, texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    code = run_command(
        "collect", "--model", model_dir, "--datasets", f"prose={texts / 'prose.jsonl'},more={texts / 'more.jsonl'}",
        "--target_traces", 161, "--max_length", 40, "--store", "weights,lookahead", "--lookahead", 1,
        "--shard_size_mb", 0.3, "--device", "cpu", "--output_dir", folder,
    )  # fmt: skip
    assert code == 0
    return folder
