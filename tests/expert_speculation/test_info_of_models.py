"""`info MODEL`: what would be traced, told from the configuration alone."""

import json
from pathlib import Path

import pytest

from expert_speculation.command import main
from moe.embedded import embedded_model


def test_a_model_is_described_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "dtype": "bfloat16"}))
    with pytest.raises(SystemExit) as exit_:
        main(["info", str(tmp_path), "--json", str(tmp_path / "facts.json")])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["kind"] == "model"
    assert facts["router_class"] == "MixtralTopKRouter"
    assert (facts["num_layers"], facts["num_experts"], facts["top_k"]) == (32, 8, 2)
    assert set(facts["quantized_bytes"]) == {"int8", "nf4", "nf4-double"}
    assert facts["quantized_bytes"]["nf4"] == 26_386_898_944
    assert "none 93.1 GB, int8 46.7 GB, nf4 26.4 GB, nf4-double 24.2 GB" in printed
    assert "experts 90.2 GB" in printed
    assert " 0-31\n" in printed
    assert "None" not in printed


def test_the_embedded_model_is_found_from_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if embedded_model() is None:
        pytest.skip("the embedded mini-Mixtral is not there")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["info", "models/mini-mixtral"])
    assert exit_.value.code == 0
    assert "mini-mixtral" in capsys.readouterr().out


def test_a_model_that_can_not_be_traced_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text", "num_hidden_layers": 2}))
    with pytest.raises(SystemExit) as exit_:
        main(["info", str(tmp_path)])
    assert exit_.value.code == 2
    assert "Llama4TextModel can not be traced" in capsys.readouterr().err
