"""`collect` as it is typed: what it prints, what it writes to --json, and with which code it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from expert_speculation.command import main
from moe.mini import SIZES, mixtral_config
from moe.training.tokenizer import train_tokenizer

Collect = Callable[..., int]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    torch.manual_seed(0)
    MixtralForCausalLM(mixtral_config(SIZES["tiny"])).save_pretrained(folder)
    train_tokenizer(["some words that a text may hold"], SIZES["tiny"].vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture
def collect(model_dir: Path, tmp_path: Path) -> Collect:
    """Return `collect(*words)`, which runs the command over five texts and returns its exit code."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{number}: some words that a text may hold\n" for number in range(5)))
    folders = ["--model", model_dir, "--datasets", texts, "--output_dir", tmp_path / "run", "--device", "cpu"]

    def run(*words: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["collect", *map(str, (*folders, *words))])
        return int(ended.value.code or 0)

    return run


def test_a_run_that_falls_short_writes_its_results_before_it_ends_with_3(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("--target_traces", 9, "--json", tmp_path / "results.json") == 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["sequences"], results["run_dir"]) == (5, str(tmp_path / "run"))
    assert results["shortfall"].startswith("5 of 9 sequences: texts gave 5 of 9 from 5 rows (no others); ")
    said = capsys.readouterr()
    assert f"Error: {tmp_path / 'run'}: holds {results['shortfall']}\n" in said.err
    assert "texts                     5 of 9 traces\n" in said.out


def test_a_dry_run_says_what_would_be_missing_and_which_batches_which_memory_gets(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("--target_traces", 9, "--dry_run", "--json", tmp_path / "plan.json") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["batch_tokens"] == 8192
    assert plan["batch_tokens_by_memory"] == {"80 GB": 65536, "48 GB": 32768, "24 GB": 16384, "else": 8192}
    said = capsys.readouterr().out
    assert said.endswith(f"The run would end incomplete, with {plan['shortfall']}.\n")
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in said.splitlines()}
    assert lines["batch_tokens"] == "8,192"
    assert lines["batch_tokens of a GPU with"] == "80 GB 65,536, 48 GB 32,768, 24 GB 16,384, else 8,192"


def test_a_dry_run_says_what_each_execution_needs_and_with_measure_how_long_it_takes(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("--dry_run") == 0
    resident, streamed = (line for line in capsys.readouterr().out.splitlines() if ": quantization none, " in line)
    assert resident.startswith("resident, chosen: ")
    assert resident.endswith(" GB read to start")
    assert streamed.startswith("streamed: ")
    assert streamed.endswith(" GB in 1 pass")
    assert collect("--dry_run", "--measure", "--json", tmp_path / "plan.json") == 0
    assert capsys.readouterr().out.count(" a million tokens)") == 2
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["execution"] == "resident"
    assert all(
        each["seconds_per_million_tokens"] > each["seconds"] > each["seconds_to_start"] > 0
        for each in plan["executions"].values()
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_all_ends_with_0_and_without_a_word_of_shortage(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("--target_traces", 5, "--batch-size", "auto", "--generate", 3, "--temperature", 0) == 0
    said = capsys.readouterr()
    assert "incomplete" not in said.out
    assert "shortfall" not in said.out
    assert "--batch_size auto: 5 sequences of " in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_size", "many"], "'many' is neither a whole number nor 'auto'"),
        (["--quantization", "fp8"], "'fp8' is not one of auto, none, int8, nf4, nf4-double."),
        (["--batch_size", "auto", "--batch_tokens", "64"], "--batch_tokens 64: --batch_size auto finds"),
        (["--generate", "-1"], "--generate -1: must not be negative"),
        (["--temperature", "-1"], "--temperature -1: must not be negative; 0 takes the likeliest token"),
        (["--lookahead", "1", "--lookahead_norm", "mine"], "--lookahead_norm mine: unknown; use next, own"),
    ],
)
def test_options_that_can_not_be_meant_exit_2(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert collect(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
