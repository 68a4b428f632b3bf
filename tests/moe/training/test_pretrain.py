import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from groundwork.errors import ConfigurationError, IncompleteError
from moe.training.pretrain import PretrainSettings, pretrain

WORDS = [
    "the",
    "router",
    "sends",
    "each",
    "token",
    "to",
    "two",
    "experts",
    "of",
    "eight",
    "and",
    "their",
    "outputs",
    "are",
    "added",
    "by",
    "weight",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    with (folder / "words.jsonl").open("w") as file:
        for _ in range(300):
            picks = torch.randint(0, len(WORDS), (60,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(WORDS[pick] for pick in picks)}) + "\n")
    return folder


def _settings(text, output_dir, **changes):
    given = {"size": "tiny", "text": (text,), "output_dir": output_dir, "steps": 8, "device": "cpu", **changes}
    return PretrainSettings(**given)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("models") / "whole"
    return output_dir, pretrain(_settings(text, output_dir))


def test_training_lowers_the_loss_and_leaves_a_loadable_model(trained):
    output_dir, record = trained
    losses = [json.loads(line)["loss"] for line in (output_dir / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3
    assert record["held_out_loss"]["words"] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(output_dir)("the router 42")["input_ids"]
    assert ids[0] == model.config.bos_token_id
    assert AutoTokenizer.from_pretrained(output_dir).decode(ids, skip_special_tokens=True) == "the router 42"
    assert not (output_dir / "checkpoint.safetensors").exists()


def test_a_stopped_and_resumed_training_ends_with_the_same_weights(text, trained, tmp_path):
    with pytest.raises(IncompleteError, match="stopped after step 3 of 8"):
        pretrain(_settings(text, tmp_path, stop_after=3))
    record = pretrain(_settings(text, tmp_path, resume=True))
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (trained[0], tmp_path))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert record["held_out_loss"] == trained[1]["held_out_loss"]


def test_resuming_another_training_is_refused_with_the_differing_settings(text, tmp_path):
    with pytest.raises(IncompleteError):
        pretrain(_settings(text, tmp_path, stop_after=1))
    with pytest.raises(ConfigurationError, match=r"learning_rate was 0.005, now 0.001, steps was 8, now 9"):
        pretrain(_settings(text, tmp_path, resume=True, steps=9, learning_rate=1e-3))


def test_training_can_start_from_a_trained_model_and_its_tokenizer(text, trained, tmp_path):
    fresh = json.loads((trained[0] / "log.jsonl").read_text().splitlines()[0])["loss"]
    pretrain(_settings(text, tmp_path / "on", steps=2, init_from=trained[0]))
    first = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert first < fresh - 0.3
    assert (tmp_path / "on" / "tokenizer.json").read_bytes() == (trained[0] / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigurationError, match=r"has vocab_size 512, but --size demo has 4096"):
        pretrain(_settings(text, tmp_path / "other", size="demo", init_from=trained[0]))


def test_a_folder_that_holds_files_is_refused_without_resume(text, trained):
    with pytest.raises(ConfigurationError, match="holds files already; continue with --resume"):
        pretrain(_settings(text, trained[0]))
    with pytest.raises(ConfigurationError, match="this training is finished"):
        pretrain(_settings(text, trained[0], resume=True))


def test_too_little_text_is_refused_with_its_token_count(tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(ConfigurationError, match=r"tokens are fewer than one row of 64"):
        pretrain(_settings(tmp_path / "a.txt", tmp_path / "model"))
