"""What a model's configuration tells of tracing it: bytes of its checkpoint by layer, and of a token on its way."""

from dataclasses import dataclass

from moe import quantize
from moe.description import sketch_model
from moe.foresight import Loading
from moe.quantizable import bytes_by_layer


@dataclass(frozen=True)
class Footprint:
    """Bytes of the checkpoint outside of the layers and of each layer, without the head, and bytes of one token."""

    outside: int
    layers: tuple[int, ...]
    state: int
    """Its hidden states, between two layers."""
    activations: int
    """What its batch takes for it in the widest layer: an estimate."""
    last_moe_layer: int
    """No layer behind it is traced."""


def footprint(loading: Loading, dtype: str = "auto") -> Footprint:
    """Return the footprint of the model that is loaded so; nothing but its configuration is read.

    Sizes are those of the configuration's shapes in the checkpoint's dtype; of a checkpoint in MXFP4 or FP8 those of
    its files, head included, where they are here. Activations: of each chosen expert its gate, its value, their product
    and the output, and four times the hidden states, as transformers' experts make them.
    """
    kept = loading.stored or "none"
    as_stored, layout = sketch_model(loading.source, "auto")
    outside, layers = bytes_by_layer(as_stored, layout, kept)
    if not quantize.is_ours(kept) and kept != "none":
        whole = sum(path.stat().st_size for path in loading.source.folder.glob("*.safetensors"))
        share = min(whole / (outside + sum(layers)), 1.0) if whole else 1.0
        layers = [round(share * each) for each in layers]
    sketch, _ = sketch_model(loading.source, dtype)
    hidden = sketch.config.get_text_config().hidden_size
    size = sketch.dtype.itemsize
    site = layout.sites[0]
    parameters = sum(each.numel() for each in site.experts.parameters()) / layout.num_experts
    inner = parameters / (3 * hidden)  # of a gated expert: its matrices are 3 x hidden x inner
    return Footprint(
        outside=outside,
        layers=tuple(layers),
        state=hidden * size,
        activations=round(size * (layout.top_k * (3 * inner + hidden) + 4 * hidden)),
        last_moe_layer=layout.moe_layers[-1],
    )
