"""The machines: values no machine has are refused, and the packaged ones say where their numbers are from."""

import re
from dataclasses import fields, replace

import pytest

from groundwork.errors import ConfigurationError
from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.loading import hardware_profile, known_hardware, model_profile

MACHINE = hardware_profile("rtx-3090")
NUMBERS = [each.name for each in fields(HardwareProfile) if each.name not in ("name", "source")]
# Tokens per second of gpt-oss-20b decoded by llama.cpp, and the bytes of its file, from the sources of the profiles.
DECODED = {
    "rtx-3090": (147.5, 11.27 * 2**30),
    "rtx-4090": (266, 11.6e9),
    "a100-40gb": (180, 11.6e9),
    "a100-80gb": (189, 11.6e9),
    "h100": (286, 11.6e9),
}


def test_the_machines_of_the_documentation_are_packaged():
    wanted = {"rtx-3090", "rtx-4090", "rtx-a6000", "a100-40gb", "a100-80gb", "h100", "laptop"}
    assert set(known_hardware()) == wanted


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e10])
def test_a_number_that_no_machine_has_is_refused_by_name(field, value):
    with pytest.raises(
        ConfigurationError, match=f"'RTX 3090': {field} is {re.escape(f'{value:g}')}; give it a number from "
    ):
        replace(MACHINE, **{field: value})


def test_rates_and_memory_must_be_above_zero_and_latencies_need_not():
    with pytest.raises(ConfigurationError, match=r"link_gb_s is 0; give it a number from 0\.001 to 1e\+09"):
        replace(MACHINE, link_gb_s=0.0)
    instant = replace(MACHINE, link_latency_us=0.0, layer_overhead_us=0.0, reserved_gb=0.0)
    assert instant.link_latency_s == 0


def test_memory_must_be_left_for_weights():
    with pytest.raises(ConfigurationError, match=r"reserved_gb is 25\.4 of 25\.4 GB"):
        replace(MACHINE, reserved_gb=25.4)


def test_properties_are_in_bytes_seconds_and_operations():
    machine = hardware_profile("h100")
    assert machine.gpu_memory_bytes == 84_900_000_000
    assert (machine.reserved_bytes, machine.ram_bytes) == (2_000_000_000, 256_000_000_000)
    assert machine.memory_bytes_per_s == pytest.approx(2.6e12)
    assert machine.operations_per_s == pytest.approx(7e14)
    assert machine.layer_overhead_s == pytest.approx(1.1e-4)
    assert machine.link_bytes_per_s == pytest.approx(5.5e10)
    assert machine.link_latency_s == pytest.approx(1e-5)
    assert machine.disk_bytes_per_s == pytest.approx(7.2e9)
    assert machine.disk_latency_s == pytest.approx(1e-4)


@pytest.mark.parametrize("name", known_hardware())
def test_every_number_of_a_packaged_machine_has_its_source(name):
    lines = hardware_profile(name).source.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == NUMBERS
    assert all("assumption" in line or any(digit in line for digit in "0123456789") for line in lines)


@pytest.mark.parametrize("name", DECODED)
def test_layer_overheads_follow_from_the_decoding_rates_that_they_cite(name):
    machine, model = hardware_profile(name), model_profile("gpt-oss-20b")
    rate, file_bytes = DECODED[name]
    assert f" {rate:g} tokens/s" in machine.source
    resident = model.moe_layers * model.layer_parameters + model.other_parameters
    experts = model.moe_layers * model.num_experts * model.expert_bytes("mxfp4")
    per_parameter = (file_bytes - experts) / resident
    read = model.moe_layers * model.top_k * model.expert_bytes("mxfp4")
    read += per_parameter * (resident - model.embedding_parameters)
    assert f"{read / 1e9:.2f} GB at memory_gb_s" in machine.source
    overhead_s = (1 / rate - read / machine.memory_bytes_per_s) / model.moe_layers
    assert machine.layer_overhead_us == pytest.approx(overhead_s * 1e6, abs=0.5)
