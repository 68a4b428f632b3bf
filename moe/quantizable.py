"""What quantising would make of a model, told from its shapes: which matrices, how many bytes, and what forbids it."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from groundwork.errors import ConfigurationError
from moe.routers import RouterLayout
from moe.split_experts import Split, find_split, matrix_shapes


def quantized_bytes(model: PreTrainedModel, layout: RouterLayout) -> dict[str, int]:
    """Return mode -> bytes of `model`, whose weights may be on the meta device; empty where it can not be quantised."""
    split = find_split(model, layout)
    if split is None:
        return {}
    matrices = _quantized_matrices(model, layout, split)
    whole = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in matrices)
    return {
        mode: whole + sum(count * size(rows, columns) for count, rows, columns in matrices.values())
        for mode, size in _MATRIX_BYTES.items()
    }


def two_layers_bytes(model: PreTrainedModel, layout: RouterLayout, mode: str) -> int:
    """Return the bytes of all that lies outside of `model`'s layers, and twice those of its largest one, in a mode."""
    outside, layers = bytes_by_layer(model, layout, mode)
    return outside + 2 * max(layers)


def bytes_by_layer(model: PreTrainedModel, layout: RouterLayout, mode: str) -> tuple[int, list[int]]:
    """Return the bytes of all that lies outside of `model`'s layers, and of each layer, in a mode."""
    split = find_split(model, layout) if mode in _MATRIX_BYTES else None
    matrices = _quantized_matrices(model, layout, split) if split else {}
    place = layout.place
    outside, layers = 0, [0] * len(list(model.get_submodule(place).children()))
    for name, parameter in model.named_parameters():
        count, rows, columns = matrices.get(id(parameter), (0, 0, 0))
        size = count * _MATRIX_BYTES[mode](rows, columns) if count else parameter.nbytes
        if name.startswith(f"{place}."):
            layers[int(name.removeprefix(f"{place}.").partition(".")[0])] += size
        else:
            outside += size
    return outside, layers


def count_matrices(model: PreTrainedModel, layout: RouterLayout) -> int:
    """Return how many matrices quantising makes, or would make, of `model`; 0 where it can not be quantised."""
    split = find_split(model, layout)
    return sum(count for count, _, _ in _quantized_matrices(model, layout, split).values()) if split else 0


def check_quantizable(model: PreTrainedModel, layout: RouterLayout, mode: str, device: torch.device) -> None:
    """Raise ConfigurationError for experts that can not be split, and for shapes that bitsandbytes gets wrong.

    On a CPU bitsandbytes 0.50 restores 4-bit rows wrongly, without a word, where the blocks of 64 cross them (relative
    errors of 0.2 to 0.8 instead of 0.09), and its kernel for AVX-512 takes rows in blocks of 32, or fails.
    """
    split = find_split(model, layout)
    if split is None:
        raise ConfigurationError(
            f"--quantization {mode}: the experts of {type(model).__name__} can not be split into linear modules; "
            "use --quantization none"
        )
    if device.type != "cpu" or mode == "int8":
        return
    shapes = {(rows, width) for _, rows, width in _quantized_matrices(model, layout, split).values()}
    wrong = sorted((width, rows) for rows, width in shapes if width % 64 or rows % 32)
    if wrong:
        width, rows = wrong[-1]
        raise ConfigurationError(
            f"--quantization {mode}: on a CPU bitsandbytes fails, or computes wrongly, with 4-bit matrices {width} "
            f"wide and {rows} high, which are no multiples of 64 and 32; use --quantization int8 or none, or a GPU"
        )


def kept_modules(model: PreTrainedModel, layout: RouterLayout) -> list[str]:
    """Name the modules that stay as they are: routers, gates of shared experts, heads and tied weights."""
    routers = [site.name for site in layout.sites]
    gates = [name for name, module in model.named_modules() if getattr(module, "out_features", None) == 1]
    return [*get_keys_to_not_convert(model), *routers, *gates]


def _quantized_matrices(model: PreTrainedModel, layout: RouterLayout, split: Split) -> dict[int, tuple[int, int, int]]:
    """Return (number, rows, columns) of the matrices that each quantised parameter becomes, by the id of that."""
    matrices: dict[int, tuple[int, int, int]] = {}
    for site in layout.sites:
        for name, shape in matrix_shapes(site.experts, split).items():
            matrices[id(getattr(site.experts, name))] = shape
    skipped = kept_modules(model, layout)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and should_convert_module(name, skipped):
            matrices[id(module.weight)] = 1, module.out_features, module.in_features
    return matrices


def _nf4_bytes(rows: int, columns: int) -> int:
    """Half a byte a parameter and a float32 scale for each block of 64."""
    return -(-rows * columns // 2) + 4 * -(-rows * columns // 64)


def _nf4_double_bytes(rows: int, columns: int) -> int:
    """As NF4, with one byte a scale and a float32 for each 256 of them."""
    blocks = -(-rows * columns // 64)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256)


_MATRIX_BYTES = {
    "int8": lambda rows, columns: rows * columns + 4 * rows,  # one float32 scale a row
    "nf4": _nf4_bytes,
    "nf4-double": _nf4_double_bytes,
}
