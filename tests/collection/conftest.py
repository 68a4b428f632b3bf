"""A tiny random Mixtral with its own tokenizer, saved once, and texts for it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from collection.settings import CollectSettings
from moe.mini import SIZES, mixtral_config
from moe.training.tokenizer import train_tokenizer

WORDS = ("river", "stone", "Vogel", "naïve", "while", "return", "x=1;", "12.5", "sea\u2028shore", "🙂")


def make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Return distinct texts of 10 to `longest` words."""
    generator = random.Random(seed)
    return [
        f"{seed}-{number} " + " ".join(generator.choices(WORDS, k=generator.randint(10, longest)))
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    torch.manual_seed(0)
    MixtralForCausalLM(mixtral_config(SIZES["tiny"])).save_pretrained(folder)
    train_tokenizer(make_texts(50), SIZES["tiny"].vocabulary).save_pretrained(folder)
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
