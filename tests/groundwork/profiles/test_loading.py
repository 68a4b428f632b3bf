"""Profiles by name and from files: what was written is read back, and every fault is one sentence that names it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from groundwork.profiles.loading import (
    hardware_profile,
    known_hardware,
    known_models,
    model_profile,
    model_profile_for,
    profile_toml,
)
from groundwork.profiles.reference import with_tables

ROOT = Path(__file__).resolve().parents[3]
MACHINE = hardware_profile("laptop")


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", known_hardware())
def test_a_machine_written_to_a_file_reads_back_equal(name, tmp_path):
    profile = hardware_profile(name)
    assert hardware_profile(written(tmp_path, profile_toml(profile))) == profile


@pytest.mark.parametrize("name", known_models())
def test_a_model_written_to_a_file_reads_back_equal(name, tmp_path):
    profile = model_profile(name)
    assert model_profile(str(written(tmp_path, profile_toml(profile)))) == profile


@given(text=st.text(), rate=st.floats(min_value=1e-3, max_value=1e9))
def test_any_text_and_any_rate_survive_a_file(text, rate, tmp_path_factory):
    profile = replace(MACHINE, name=text, source=text, link_gb_s=rate)
    file = tmp_path_factory.mktemp("any") / "mine.toml"
    file.write_bytes(profile_toml(profile).encode())
    assert hardware_profile(file) == profile


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", " rtx-4090 "])
def test_packaged_names_are_forgiving(name):
    assert hardware_profile(name).name == "RTX 4090"


def test_unknown_names_list_what_there_is():
    with pytest.raises(
        ConfigurationError, match=r"--hardware rtx-2000: .*measure, one of a100-40gb, .*docs/HARDWARE.md"
    ):
        hardware_profile("rtx-2000")
    with pytest.raises(
        ConfigurationError, match=r"--model_profile gpt-2: .*one of deepseek-v2-lite, .*docs/HARDWARE.md"
    ):
        model_profile("gpt-2")


@pytest.mark.parametrize(
    ("trace", "name"),
    [
        ("gpt-oss-20b", "gpt-oss-20b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("OpenAI/GPT-OSS-20B", "gpt-oss-20b"),
        ("someone/gpt-oss-20b/", "gpt-oss-20b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B"),
        ("mixtral-8x7b-v0.1", "Mixtral-8x7B"),
        ("DeepSeek-V2-Lite-Chat", "DeepSeek-V2-Lite"),
        ("/somewhere/models/mini-mixtral", "mini-mixtral"),
    ],
)
def test_a_trace_finds_its_model(trace, name):
    assert model_profile_for(trace).name == name


@pytest.mark.parametrize("trace", ["", "/", "gpt-oss-120b", "mistralai/Mixtral-8x22B-v0.1", "mixtral-nf4"])
def test_a_model_without_a_profile_is_refused_with_the_flag(trace):
    with pytest.raises(ConfigurationError, match=r"--model_profile: one of deepseek-v2-lite, .*docs/HARDWARE.md"):
        model_profile_for(trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("link_gb_s = 12.5", ""), "key 'link_gb_s' is missing; the keys are name, source"),
        (("\nlink_gb_s", "\nlink_gbs"), "key 'link_gbs' is unknown; the keys are name, source"),
        (("link_gb_s = 12.5", "link_gb_s = true"), "link_gb_s is True; write a number there"),
        (("link_gb_s = 12.5", "link_gb_s = '12'"), "link_gb_s is '12'; write a number there"),
        (("link_gb_s = 12.5", "link_gb_s = inf"), "link_gb_s is inf; give it a number from "),
        (("link_gb_s = 12.5", "link_gb_s = 1" + "0" * 400), "link_gb_s is too large for a number"),
        (("link_gb_s = 12.5", "link_gb_s = 1" + "0" * 9000), "not TOML"),
        (("name = ", "name = 5 #"), "name is 5; write a text there"),
        (("name = ", "name "), "not TOML"),
    ],
)
def test_a_faulty_file_is_refused_with_its_name_and_the_remedy(change, message, tmp_path):
    old, new = change
    text = profile_toml(MACHINE)
    assert old in text
    file = written(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=message) as caught:
        hardware_profile(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("top_k = 4", "top_k = 4.0"), "top_k is 4.0; write a whole number there"),
        (('names = ["openai', 'names = [5, "openai'), "names is .*; write a list of texts there"),
        (('"bf16" = 2.0', '"bf16" = "2"'), "precisions.bf16 is '2'; write a number there"),
        (("precisions = ", "precisions = 5 #"), "precisions is 5; write a table of numbers there"),
        (("top_k = 4", "top_k = 40"), "model profile 'gpt-oss-20b': top_k is 40 of 32 experts"),
    ],
)
def test_a_faulty_model_is_refused_with_its_name_and_the_remedy(change, message, tmp_path):
    old, new = change
    text = profile_toml(model_profile("gpt-oss-20b"))
    assert old in text
    file = written(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=message) as caught:
        model_profile(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_names_and_stored_precision_may_be_left_out_of_a_file(tmp_path):
    lines = profile_toml(model_profile("mini-mixtral")).splitlines()
    kept = [line for line in lines if not line.startswith(("names", "resident_bytes"))]
    assert len(kept) == len(lines) - 2
    profile = model_profile(written(tmp_path, "\n".join(kept)))
    assert (profile.names, profile.resident_bytes_per_parameter) == ((), 2.0)


def test_what_can_not_be_read_is_refused(tmp_path):
    large, binary = tmp_path / "large.toml", tmp_path / "binary.toml"
    large.write_bytes(b"#" * 1_000_001)
    binary.write_bytes(b"\xff\xfe")
    faults = {
        tmp_path / "absent.toml": "No such file",
        tmp_path: "Is a directory",
        Path("a\0b.toml"): "null",
        large: "larger than",
        binary: "not TOML",
    }
    for path, message in faults.items():
        with pytest.raises(ConfigurationError, match=message):
            hardware_profile(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    file = written(tmp_path, profile_toml(MACHINE))
    file.chmod(0)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        hardware_profile(file)


def test_the_documentation_has_the_packaged_profiles():
    text = (ROOT / "docs" / "HARDWARE.md").read_text()
    assert with_tables(text) == text, "run 'make docs'"


def test_the_files_that_the_documentation_shows_are_profiles(tmp_path):
    blocks = (ROOT / "docs" / "HARDWARE.md").read_text().split("```toml\n")[1:]
    machine, model = (block.partition("```")[0] for block in blocks)
    assert hardware_profile(written(tmp_path, machine)).name == "my machine"
    assert model_profile(written(tmp_path, model)).names == ("someone/my-moe",)
