"""A file of tensors is read as it was written, or refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from collection.tensor_files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden/0": torch.randn(3, 5, 4, generator=generator).to(torch.bfloat16),
        "ids.2/12": torch.randint(0, 8, (15, 2), generator=generator),
        "nothing": torch.zeros(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(2.5),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("tensors") / "made" / "00000.safetensors"
    write_tensors(path, tensors)
    return path


def test_what_is_read_is_what_was_written(written: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = read_tensors(written)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=200)
def test_any_bit_that_changes_is_noticed(written: Path, place: float, bit: int) -> None:
    content = bytearray(written.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    changed = written.with_name("changed.safetensors")
    changed.write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011 - as many sentences as there are things to change
        read_tensors(changed)


def test_a_file_without_checksums_or_cut_short_is_refused(written: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="crc32"):
        read_tensors(tmp_path / "plain.safetensors")
    (tmp_path / "short.safetensors").write_bytes(written.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"(?i)incomplete|buffer"):
        read_tensors(tmp_path / "short.safetensors")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "missing.safetensors")
