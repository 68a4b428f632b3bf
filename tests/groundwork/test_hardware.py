"""Devices are chosen by name or by free memory, and what is not there is refused with the choices."""

import pytest
import torch

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device, choose_devices, describe_device, free_memory_bytes, peak_memory_bytes
from groundwork.provenance import library_versions


def test_cpu_is_always_there():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_unknown_device_is_refused_with_the_choices(name):
    with pytest.raises(ConfigurationError, match="use 'auto' or one of cpu"):
        choose_device(name)


def test_a_device_that_is_missing_among_several_is_named_beside_the_whole_value():
    with pytest.raises(ConfigurationError, match=r"^--device cpu\+gpu: 'gpu' is not a device of this machine; use"):
        choose_devices("cpu+gpu")
    with pytest.raises(ConfigurationError, match=r"^--device cpu,cpu\+cpu: a plus sign joins GPUs"):
        choose_devices("cpu+cpu", part_of="cpu,cpu+cpu")


def test_memory_figures_are_bytes_of_this_machine():
    device = choose_device("cpu")
    assert 2**20 < free_memory_bytes(device) < 2**50
    before = peak_memory_bytes(device)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 2**24 < before <= peak_memory_bytes(device) < 2**50
    assert block.sum() == 64 * 2**20
    assert "threads" in describe_device(device)


def test_versions_name_python_and_torch():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "numpy", "pyarrow", "transformers"} <= set(versions)
