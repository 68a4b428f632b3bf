"""A checkpoint comes back as it was saved, is refused when damaged, and names settings that differ."""

import pytest
import torch

from groundwork.checkpoint import load_checkpoint, refuse_other_settings, save_checkpoint
from groundwork.errors import ConfigurationError


def test_tensors_and_facts_come_back_as_saved_and_leave_one_file(tmp_path):
    tensors = {"weight": torch.randn(3, 4).T, "step": torch.tensor(7.0)}
    save_checkpoint(tmp_path / "c.safetensors", {"weight": torch.zeros(1)}, {"step": 6})
    save_checkpoint(tmp_path / "c.safetensors", tensors, {"step": 7, "rate": 0.1})
    found, facts = load_checkpoint(tmp_path / "c.safetensors")
    assert facts == {"step": 7, "rate": 0.1}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 60])
def test_a_cut_file_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"weight": torch.ones(8)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match=r"c\.safetensors: damaged checkpoint .*delete it and train again"):
        load_checkpoint(path)


def test_other_settings_are_refused_with_both_values(tmp_path):
    refuse_other_settings(tmp_path, {"seed": 1, "shape": [2]}, {"seed": 1, "shape": (2,)})
    with pytest.raises(ConfigurationError, match="seed was 1, now 2, steps was None, now 5"):
        refuse_other_settings(tmp_path, {"seed": 1}, {"seed": 2, "steps": 5})
