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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
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
    return tmp_path / "tiny"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{number}: some words that a text may hold\n" for number in range(5)))
    return path


def test_a_model_is_packed_and_traced_layer_by_layer(
    tiny: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    assert command("pack", tiny, out, "--device", "cpu", "--json", tmp_path / "index.json") == 0
    said = capsys.readouterr().out
    assert "quantization  nf4\n" in said
    assert json.loads((tmp_path / "index.json").read_text()) == json.loads((out / "packed.json").read_text())
    assert command("pack", tiny, out, "--device", "cpu") == 2
    assert f"Error: {out}: exists already; name a new folder for the packed model\n" in capsys.readouterr().err
    words = ["collect", "--datasets", texts, "--target_traces", 5, "--device", "cpu", "--execution", "streamed"]
    assert command(*words, "--model", out, "--output_dir", tmp_path / "run", "--memory_budget_gb", 0) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["spec"]["quantization"], plan["spec"]["model_name"]) == ("nf4", "tiny")
    assert command("verify", tmp_path / "run") == 0
    layer = out / "layer-00002.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    capsys.readouterr()
    assert command(*words, "--model", out, "--output_dir", tmp_path / "other") == 2
    assert f"Error: {layer}: its sha256 is " in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("execution", ["resident", "streamed"])
def test_a_run_of_the_original_goes_on_from_its_pack_and_back(
    tiny: Path, texts: Path, tmp_path: Path, mode: str, execution: str
) -> None:
    """The shard that is missing is made again, in a file of the same bytes."""
    assert command("pack", tiny, tmp_path / "packed", "--quantization", mode, "--device", "cpu") == 0
    run = tmp_path / "run"
    words = ["collect", "--datasets", texts, "--target_traces", 5, "--device", "cpu", "--shard_size_mb", 0.0005]
    words += ["--output_dir", run, "--execution", execution]
    original, pack = ["--model", tiny, "--quantization", mode], ["--model", tmp_path / "packed"]
    assert command(*words, *original) == 0
    shards = {path: path.read_bytes() for path in (run / "data").iterdir()}
    assert len(shards) > 1
    first = min(shards)
    for model in (pack, original):
        first.unlink()
        assert command(*words, *model, "--resume") == 0
        assert {path: path.read_bytes() for path in (run / "data").iterdir()} == shards


def test_a_run_of_another_precision_does_not_go_on_from_a_pack(
    tiny: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("pack", tiny, tmp_path / "packed", "--device", "cpu") == 0
    words = ["collect", "--datasets", texts, "--target_traces", 5, "--device", "cpu", "--output_dir", tmp_path / "run"]
    assert command(*words, "--model", tiny) == 0
    capsys.readouterr()
    assert command(*words, "--model", tmp_path / "packed", "--resume") == 2
    assert "packed: the checkpoint is already quantised, as nf4; leave --quantization out" in capsys.readouterr().err


def test_modes_are_shown_with_hyphens_and_taken_with_either(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("pack", "--help") == 0
    assert "[nf4|nf4-double|int8]" in capsys.readouterr().out
    for mode in ("nf4-double", "nf4_double"):
        assert command("pack", tiny, tmp_path / mode, "--quantization", mode, "--device", "cpu") == 0
        assert json.loads((tmp_path / mode / "packed.json").read_text())["quantization"] == "nf4-double"


def test_generation_can_not_be_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("collect", "--execution", "streamed", "--generate", 4, "--output_dir", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        "Error: --generate 4: decodes token by token, which would read the whole model for each; use --execution "
        "resident\n"
    )
