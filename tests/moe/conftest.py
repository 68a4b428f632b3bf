"""Tiny random models of some mixture-of-experts families, and folders as their publishers lay them out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moe.description import sketch_model
from moe.load import read_weights
from moe.source import find_source, read_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_models import VOCABULARY, tiny_config, tiny_model

FAMILIES = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """Return `build(family, **changes)`: a base model of three layers."""
    return lambda family, **changes: tiny_model(family, **({"num_hidden_layers": 3} | changes))


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a random model with a head, in several safetensors files with an index, and a tokenizer."""

    def saved(family: str = "mixtral", *, tokenizer: bool = True, shards: bool = True, **changes: Any) -> Path:
        folder = tmp_path / family
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **({"num_hidden_layers": 3} | changes)))
        model.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
        if tokenizer:
            words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
            words.pre_tokenizer = pre_tokenizers.Whitespace()
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
        return folder

    return saved


@pytest.fixture
def save_copy() -> Callable[[Path, Path, str], None]:
    """Return `save_copy(folder, copy, mode)`: quantise a checkpoint and save it, as transformers itself does both.

    Nothing runs through the model in between: on a CPU bitsandbytes packs 4-bit weights anew in the first forward pass,
    and saves them corrupt from then on.
    """

    def saved(folder: Path, copy: Path, mode: str) -> None:
        source = find_source(str(folder))
        sketch, _ = sketch_model(source, "auto")
        causal: Any = AutoModelForCausalLM
        auto_class = causal if type(sketch.config) in causal._model_mapping else AutoModel
        read_weights(auto_class, source, mode, False, "auto", torch.device("cpu")).save_pretrained(copy)
        read_tokenizer(source).save_pretrained(copy)

    return saved


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three right-padded sequences: token ids [3, 11] and lengths [3]."""
    lengths = torch.tensor([11, 7, 3])
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(11)[None, :] < lengths[:, None], ids, 0), lengths


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
