import pytest

from expert_speculation.command import cli
from expert_speculation.tour import prepare, steps
from groundwork.errors import ConfigurationError


def test_every_command_of_the_demo_parses(tmp_path):
    for verb, *arguments in steps(tmp_path):
        cli.commands[verb].make_context(verb, arguments, parent=cli.make_context("expert-speculation", [verb]))


def test_an_earlier_demo_is_replaced(tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "report.html").write_text("old")
    prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_content_is_refused_and_kept(tmp_path):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigurationError, match=r"holds thesis\.tex, which no demo wrote"):
        prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "thesis.tex"]
