"""Opening a checkpoint to be streamed: all of `load_model` but the weights."""

from typing import Any

from transformers import AutoModel

from moe import quantize, stored
from moe.foresight import foresee_loading
from moe.load import LoadedModel, call_loader, describe_loaded
from moe.routers import find_routers
from moe.source import find_source, read_tokenizer
from moe.streaming.layered import LayeredModel
from moe.streaming.postponed import postponed_reading


def open_layered(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
) -> tuple[LoadedModel, LayeredModel]:
    """Open the MoE model `path` so that its layers can be read one by one; arguments and errors are `load_model`'s.

    The model is on the meta device; `quantization` is what the layers will be when they are read, equal bit for bit to
    those of a model that is loaded whole.
    """
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "experts_implementation": experts_implementation,
    }
    loading = foresee_loading(path, device=device, dtype=dtype, quantization=quantization, streamed=True, **options)
    tokenizer = read_tokenizer(loading.source)
    given = {name: value for name, value in options.items() if value}
    source, is_stored = find_source(path, weights=True), loading.stored is not None
    with postponed_reading() as postponed:
        model, _ = call_loader(AutoModel, source, loading.mode, is_stored, dtype, loading.device, **given)
    layered = LayeredModel(postponed[0], find_routers(model), source, loading.mode)
    if is_stored and not quantize.is_ours(loading.mode):
        stored.settle_loaded(model, loading.mode, layered.unexpected)
    return describe_loaded(model, tokenizer, loading), layered
