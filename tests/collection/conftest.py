"""A tiny random Mixtral with its own tokenizer, saved once, and texts for it."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import MixtralForCausalLM

from collection.settings import CollectSettings
from moe.mini import SIZES, mixtral_config
from moe.training.tokenizer import train_tokenizer

WORDS = ("river", "stone", "Vogel", "naïve", "while", "return", "x=1;", "12.5", "sea\u2028shore", "🙂")


def _make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    generator = random.Random(seed)
    return [
        f"{seed}-{number} " + " ".join(generator.choices(WORDS, k=generator.randint(10, longest)))
        for number in range(count)
    ]


def _write_texts(path: Path, texts: list[str], column: str = "text") -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: text, "n": 1}, ensure_ascii=False) + "\n" for text in texts))
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({column: texts, "n": [1] * len(texts)}), path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[column, "n"], *([text, 1] for text in texts)])
    return path


@pytest.fixture
def make_texts() -> Callable[..., list[str]]:
    """Return `make(count, seed, longest)`: distinct texts of 10 to `longest` words."""
    return _make_texts


@pytest.fixture
def write_texts() -> Callable[..., Path]:
    """Return `write(path, texts, column)`: one text a row, in the format of the suffix."""
    return _write_texts


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    torch.manual_seed(0)
    MixtralForCausalLM(mixtral_config(SIZES["tiny"])).save_pretrained(folder)
    train_tokenizer(_make_texts(50), SIZES["tiny"].vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture
def make_settings(model_dir: Path, tmp_path: Path) -> Callable[..., CollectSettings]:
    def make(**changes: Any) -> CollectSettings:
        defaults: dict[str, Any] = {
            "model": str(model_dir),
            "device": "cpu",
            "max_length": 64,
            "target_traces": 8,
            "batch_tokens": 256,
            "output_dir": tmp_path / "run",
        }
        return CollectSettings(**(defaults | changes))

    return make
