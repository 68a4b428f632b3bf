"""A model that several GPUs hold: every part has its place, and the routing is that of a model in one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from groundwork.errors import ConfigurationError
from moe.foresight import TooLargeError, foresee_loading
from moe.load import load_model, read_weights
from moe.quantizable import bytes_by_layer
from moe.routers import find_routers
from moe.source import find_source
from moe.spreading import DeviceMap, spread, with_head

FIRST, SECOND, THIRD = (torch.device(f"cuda:{index}") for index in range(3))


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _device_of(name: str, placed: DeviceMap) -> torch.device:
    (device,) = [device for part, device in placed.items() if f"{name}.".startswith(f"{part}.")]
    return device


def test_every_parameter_has_one_place_and_layers_lie_in_order_on_one_device_each(
    build: Callable[..., PreTrainedModel], family: str
) -> None:
    model = build(family, num_hidden_layers=6)
    layout, size = find_routers(model), _bytes(model)
    placed, share = spread(model, layout, "none", size, {FIRST: size, SECOND: size, THIRD: size})
    devices = {name: _device_of(name, placed) for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    layer_of = {
        name: int(name.removeprefix(f"{layout.place}.").split(".")[0])
        for name in devices
        if name.startswith(f"{layout.place}.")
    }
    inside = {(layer, devices[name].index) for name, layer in layer_of.items()}
    assert [layer for layer, _ in sorted(inside)] == list(range(6))  # each layer on one
    assert [index for _, index in sorted(inside)] == sorted(index for _, index in inside)
    assert {device for name, device in devices.items() if not name.startswith(f"{layout.place}.")} == {FIRST}
    held = dict.fromkeys((FIRST, SECOND, THIRD), 0)
    for name, parameter in model.named_parameters():
        held[devices[name]] += parameter.nbytes
    assert share == pytest.approx(max(held.values()) / size)
    outside, layers = bytes_by_layer(model, layout, "none")
    assert share * size <= max(size / 3 + max(layers), outside + max(layers))


def test_a_device_with_less_room_takes_less(build: Callable[..., PreTrainedModel]) -> None:
    model = build("mixtral", num_hidden_layers=8)
    layout, size = find_routers(model), _bytes(model)
    placed, share = spread(model, layout, "none", size, {FIRST: size, SECOND: size // 4})
    count = sum(device == SECOND for name, device in placed.items() if name.startswith("layers."))
    assert 0 < count <= 2
    assert share < 1


def test_what_a_quantised_model_takes_is_what_is_shared_out(build: Callable[..., PreTrainedModel]) -> None:
    model = build("mixtral", num_hidden_layers=8)
    layout = find_routers(model)
    outside, layers = bytes_by_layer(model, layout, "nf4")
    size = outside + sum(layers)
    _, share = spread(model, layout, "nf4", size, {FIRST: size, SECOND: size})
    assert 0.5 <= share <= 0.5 + (outside + max(layers)) / size


def test_a_map_of_places_is_loaded_as_it_says(save: Callable[..., Path], build: Callable[..., PreTrainedModel]) -> None:
    folder = save("mixtral")
    cpu = torch.device("cpu")
    for auto_class in (AutoModel, AutoModelForCausalLM):
        whole = read_weights(auto_class, find_source(str(folder)), "none", False, "auto", cpu)
        base = whole.base_model
        placed, _ = spread(base, find_routers(base), "none", _bytes(base), {cpu: 2**40})
        placed = placed if auto_class is AutoModel else with_head(whole, placed)
        loaded = read_weights(auto_class, find_source(str(folder)), "none", False, "auto", placed)
        assert {_device_of(name, placed) for name, _ in whole.named_parameters()} == {cpu}
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name))


def test_two_gpus_hold_what_one_can_not(save: Callable[..., Path], gpus: Callable[..., None]) -> None:
    folder = save("mixtral", num_hidden_layers=8)
    needed = foresee_loading(str(folder), device="cpu").needed
    gpus(needed * 3 // 4, needed * 3 // 4)
    with pytest.raises(TooLargeError, match="cuda:0 has"):
        foresee_loading(str(folder), device="cuda:0")
    loading = foresee_loading(str(folder), device="cuda:0+cuda:1")
    assert (loading.devices, loading.device) == ((FIRST, SECOND), FIRST)
    assert (loading.needed, loading.free) == (needed, 2 * (needed * 3 // 4))
    gpus(needed // 2, needed // 2)  # leaves no room for activations
    with pytest.raises(TooLargeError, match="cuda:0 and cuda:1 together have"):
        foresee_loading(str(folder), device="cuda:0+cuda:1")


@pytest.mark.parametrize("names", ["cpu+cpu", "cuda:0+cuda:0", "cuda:0+cpu"])
def test_only_different_gpus_are_joined(save: Callable[..., Path], gpus: Callable[..., None], names: str) -> None:
    gpus(2**40)
    with pytest.raises(ConfigurationError, match="name different GPUs"):
        load_model(str(save("mixtral")), device=names)


def test_on_pretended_gpus_spread_and_streamed_models_show_what_a_model_in_one_does_to_the_last_bit(
    save: Callable[..., Path],
) -> None:
    program = Path(__file__).with_name("pretended_gpus.py")
    ended = subprocess.run([sys.executable, program, save("mixtral")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    differing = json.loads(ended.stdout.splitlines()[-1])
    assert len(differing) == 7
    assert not any(differing.values()), differing
