"""A model that several devices hold together: which of them holds which layers, as accelerate's device maps say it."""

import torch
from transformers import PreTrainedModel

from moe.quantizable import bytes_by_layer
from moe.routers import RouterLayout

DeviceMap = dict[str, torch.device]


def spread(
    model: PreTrainedModel, layout: RouterLayout, mode: str, size: int, free: dict[torch.device, int]
) -> tuple[DeviceMap, float]:
    """Return the device of each part of `model`, and the largest share of a device's free bytes that the parts take.

    Layers stay whole and in order, one device after the other, so that hidden states cross over as seldom as can be;
    what lies outside of layers is the first device's. The shares taken are as equal as whole layers allow. `model` may
    be on the meta device; `size` is what it takes in `mode`, in bytes.
    """
    outside, layers = bytes_by_layer(model, layout, mode)
    scale = size / (outside + sum(layers))  # of what a checkpoint's own format makes of the layers
    places = _places(outside * scale, [each * scale for each in layers], list(free.values()))
    devices = list(free)
    on_first = dict.fromkeys(_outside(model, layout.place), devices[0])
    in_layers = {f"{layout.place}.{index}": devices[place] for index, place in enumerate(places)}
    taken = [0.0] * len(devices)
    for place, each in zip([0, *places], [outside, *layers], strict=True):
        taken[place] += each * scale
    return on_first | in_layers, max(each / free[device] for each, device in zip(taken, devices, strict=True))


def with_head(model: PreTrainedModel, placed: DeviceMap) -> DeviceMap:
    """Return the device map of `model`, a base model with a head on it, given the base model's: the head is first."""
    prefix = model.base_model_prefix
    first = next(iter(placed.values()))
    heads = {name: first for name, _ in model.named_children() if name != prefix}
    return heads | {f"{prefix}.{name}": device for name, device in placed.items()}


def _places(outside: float, layers: list[float], free: list[int]) -> list[int]:
    """Return the place in `free` of each layer, of those that fill each place to the smallest share that holds all."""
    low, high = 0.0, (outside + sum(layers)) / min(free)
    places = _filled(outside, layers, free, high)
    while high - low > 1e-3 * high:
        share = (low + high) / 2
        found = _filled(outside, layers, free, share)
        low, high, places = (low, share, found) if found else (share, high, places)
    assert places is not None  # the first device alone holds all where its whole share is given
    return places


def _filled(outside: float, layers: list[float], free: list[int], share: float) -> list[int] | None:
    """Return the places of layers that fill one place after the other up to `share`; None where they do not fit."""
    place, used, places = 0, outside, list[int]()
    if used > share * free[0]:
        return None
    for size in layers:
        while used + size > share * free[place]:
            place, used = place + 1, 0.0
            if place == len(free):
                return None
        used += size
        places.append(place)
    return places


def _outside(model: PreTrainedModel, place: str) -> list[str]:
    """Return the names of the largest modules, and parameters between them, that hold none of the layers at `place`."""
    names, module, prefix = [], torch.nn.Module(), ""
    for part in place.split("."):
        module = model.get_submodule(prefix.rstrip("."))
        names += [prefix + name for name, _ in module.named_parameters(recurse=False)]
        names += [prefix + name for name, _ in module.named_buffers(recurse=False)]
        names += [prefix + name for name, _ in module.named_children() if name != part]
        prefix += f"{part}."
    return names
