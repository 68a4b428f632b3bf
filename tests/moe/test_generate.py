import pytest
import torch
from transformers import MixtralForCausalLM

from groundwork.errors import ConfigurationError
from moe.generate import generate
from moe.mini import mixtral_config, size
from moe.packed import pack
from moe.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MixtralForCausalLM(mixtral_config(size("tiny"))).save_pretrained(folder)
    train_tokenizer(["some words to continue"], 512).save_pretrained(folder)
    return str(folder)


def test_the_prompt_is_continued_and_a_seed_repeats_it(model_dir):
    first, again, other = (
        generate(model_dir, "some words", max_new_tokens=12, device="cpu", seed=seed) for seed in (1, 1, 2)
    )
    assert first.startswith("some words")
    assert len(first) > len("some words")
    assert first == again != other


def test_temperature_zero_does_not_depend_on_the_seed(model_dir):
    texts = {generate(model_dir, "some", max_new_tokens=8, temperature=0, device="cpu", seed=seed) for seed in (1, 2)}
    assert len(texts) == 1


def test_a_packed_model_is_sampled(model_dir, tmp_path):
    pack(model_dir, tmp_path / "packed", quantization="int8", device="cpu")
    text = generate(str(tmp_path / "packed"), "some words", max_new_tokens=8, temperature=0, device="cpu")
    assert text.startswith("some words")
    assert len(text) > len("some words")


def test_a_missing_folder_is_refused():
    with pytest.raises(ConfigurationError, match="no/such/model/folder"):
        generate("no/such/model/folder", "x")
