import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import expert_speculation
from expert_speculation.command import cli, main
from expert_speculation.reference import render

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


@pytest.mark.parametrize("verb", cli.commands)
def test_every_verb_and_option_has_help(verb):
    command = cli.commands[verb]
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    assert CliRunner().invoke(cli, [verb, "--help"]).exit_code == 0


def test_the_cli_reference_is_what_the_commands_say():
    assert (ROOT / "docs" / "CLI.md").read_text() == render(), "run 'make docs'"


@pytest.mark.parametrize(
    "verb", ["collect", "train", "evaluate", "report", "verify", "info", "import", "pretrain", "demo"]
)
def test_the_readme_shows_every_verb(verb):
    assert f"expert-speculation {verb}" in (ROOT / "README.md").read_text()


def test_an_unknown_verb_exits_2_and_lists_the_known_ones(capsys):
    code, _, error = _run("colect", capsys=capsys)
    assert code == 2
    assert "no verb 'colect'; known verbs: demo, collect, train" in error


def test_hyphens_and_underscores_spell_the_same_option(tmp_path, capsys):
    outcomes = [
        _run("evaluate", option, str(tmp_path / "none"), capsys=capsys) for option in ("--shard_dir", "--shard-dir")
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 2
    assert str(tmp_path / "none") in outcomes[0][2]


def test_a_configuration_error_is_one_sentence_on_stderr_and_exit_code_2(tmp_path, capsys):
    code, out, error = _run("info", str(tmp_path / "none"), capsys=capsys)
    assert (code, out) == (2, "")
    assert error.startswith("Error: ")
    assert error.count("\n") == 1


def test_pretrain_dry_run_prints_the_parameter_table(capsys):
    code, out, _ = _run("pretrain", "--size", "172m", "--dry_run", capsys=capsys)
    assert code == 0
    assert out.splitlines()[-1].split() == ["total", "172,237,312"]


def test_an_interrupt_exits_130_with_the_command_that_resumes(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    code, _, error = _run("collect", "--output_dir", "run", capsys=capsys)
    assert code == 130
    assert "expert-speculation collect --output_dir run --resume" in error


def test_a_path_without_access_exits_2_with_the_remedy(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    words = [sys.executable, "-m", "expert_speculation", "verify", str(tmp_path / "locked")]
    if os.geteuid() == 0:  # to whom nothing is locked
        without = shutil.which("setpriv")
        if without is None:
            pytest.skip("root, and no setpriv to give up its powers")
        words = [without, "--bounding-set=-dac_override,-dac_read_search", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: {tmp_path}/locked/plan.json: Permission denied; give this user access to it, or name another path\n"
    )


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom expert_speculation.command import main\n"
        "try: main(['collect', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'datasets'} & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", [name for name in expert_speculation.__all__ if name != "__version__"])
def test_the_public_api_resolves(name):
    assert callable(getattr(expert_speculation, name))
