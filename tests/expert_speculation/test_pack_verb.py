"""`pack` as it is typed, and `collect --execution streamed` with what it wrote."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from expert_speculation.command import main
from moe.training.tokenizer import train_tokenizer


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return int(ended.value.code or 0)


def test_a_model_is_packed_and_traced_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "tiny")
    train_tokenizer(["some words that a text may hold"], 300).save_pretrained(tmp_path / "tiny")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{number}: some words that a text may hold\n" for number in range(5)))
    out = tmp_path / "packed"
    assert command("pack", tmp_path / "tiny", out, "--device", "cpu", "--json", tmp_path / "index.json") == 0
    said = capsys.readouterr().out
    assert "quantization  nf4\n" in said
    assert json.loads((tmp_path / "index.json").read_text()) == json.loads((out / "packed.json").read_text())
    assert command("pack", tmp_path / "tiny", out, "--device", "cpu") == 2
    assert f"Error: {out}: exists already; name a new folder for the packed model\n" in capsys.readouterr().err
    words = ["collect", "--datasets", texts, "--target_traces", 5, "--device", "cpu", "--execution", "streamed"]
    assert command(*words, "--model", out, "--output_dir", tmp_path / "run", "--memory_budget_gb", 0) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["spec"]["quantization"] == "nf4"
    assert command("verify", tmp_path / "run") == 0
    layer = out / "layer-00002.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    capsys.readouterr()
    assert command(*words, "--model", out, "--output_dir", tmp_path / "other") == 2
    assert f"Error: {layer}: its sha256 is " in capsys.readouterr().err


def test_generation_can_not_be_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("collect", "--execution", "streamed", "--generate", 4, "--output_dir", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        "Error: --generate 4: decodes token by token, which would read the whole model for each; use --execution "
        "resident\n"
    )
