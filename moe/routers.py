"""Finding the routers of a mixture-of-experts model through the router class that transformers itself records.

Every MoE family of transformers 5 names, in `_can_record_outputs["router_logits"]`, the class whose output holds the
router logits. Where that class returns `(logits, weights, ids)`, or the block around it makes the latter two of its
logits, and an `experts` module beside it takes them, one adapter covers the family. All others are refused by name:
tracing something else would be worse than no trace. `docs/MODELS.md` lists both.

Shapes: N tokens (batch and position flattened), E experts, K experts per token, D hidden size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from groundwork.errors import ConfigurationError
from moe.router_profile import observe_router, router_signature
from moe.router_site import RouterSite, refusal


@dataclass(frozen=True)
class RouterLayout:
    """The routers of a model, by layer, with what they have in common."""

    sites: tuple[RouterSite, ...]
    num_experts: int
    top_k: int
    weights_normalized: bool
    router_class: str

    @property
    def num_layers(self) -> int:
        return len(self.sites)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The model-layer index of each MoE layer; dense layers in between are left out."""
        return tuple(site.model_layer for site in self.sites)

    @property
    def place(self) -> str:
        """The dotted name of the module whose children are the model's layers."""
        return re.split(r"\.?\b\d+\.", self.sites[0].name, maxsplit=1)[0]


def find_routers(model: PreTrainedModel) -> RouterLayout:
    """Return the routers of `model`, whose weights may still be on the meta device.

    E, K and whether the weights sum to 1 are observed by running each distinct router once on random parameters of its
    own shapes, since families spell them differently in their configurations and scale the weights in their own ways.
    Raises ConfigurationError for a dense model and for a family that the adapter does not cover.
    """
    family = type(model).__name__
    sites = tuple(_sites(model, family))
    if not sites:
        raise ConfigurationError(
            f"{_origin(model)}: {family} is a dense model, it has no experts to route to; "
            "choose a mixture-of-experts model such as Mixtral"
        )
    profiles = {
        key: observe_router(site, family) for key, site in {router_signature(site): site for site in sites}.items()
    }
    sizes = {(each.num_experts, each.top_k, each.weights_normalized) for each in profiles.values()}
    if len(sizes) > 1:
        raise refusal(family, f"its layers differ in experts or experts per token ({sorted(sizes)})")
    return RouterLayout(
        tuple(
            replace(site, gives_probabilities=profiles[router_signature(site)].gives_probabilities) for site in sites
        ),
        *sizes.pop(),
        router_class=", ".join(dict.fromkeys(type(site.module).__name__ for site in sites)),
    )


def check_received(
    site: RouterSite, ids_NK: torch.Tensor, weights_NK: torch.Tensor, received: list[torch.Tensor], family: str
) -> None:
    """Raise ConfigurationError unless the experts received exactly the ids and weights that the router returned."""
    for name, sent in (("expert ids", ids_NK), ("routing weights", weights_NK)):
        if not any(
            each.numel() == sent.numel()
            and each.is_floating_point() == sent.is_floating_point()
            and torch.equal(each.reshape(sent.shape), sent.to(each.dtype))
            for each in received
        ):
            raise refusal(family, f"the experts of layer {site.model_layer} receive other {name} than its router gives")


def _sites(model: PreTrainedModel, family: str) -> Iterator[RouterSite]:
    """Yield the routers by layer; raises ConfigurationError where the family does not fit the adapter."""
    modules = dict(model.named_modules())
    wanted = list(_router_classes(model, family))
    recorded = [
        name
        for name, module in modules.items()
        if any(isinstance(module, kind) and part in f".{name}." for kind, part in wanted)
    ]
    if recorded and model.config.is_encoder_decoder:
        raise refusal(family, "it is an encoder and a decoder, and a trace has one stack of layers")
    sites: dict[int, RouterSite] = {}
    served = set()
    # In some layers another class may stand where the recorded one stands in the others: DeepSeek-V4's hash routers.
    places = tuple({f".{name.rpartition('.')[2]}" for name in recorded})
    for name, module in modules.items():
        block, _, _ = name.rpartition(".")
        if name not in recorded and not (name.endswith(places) and f"{block}.experts" in modules and places):
            continue
        layer = re.search(r"(?:^|\.)(\d+)\.", name)
        experts = getattr(modules[block], "experts", None)
        if layer is None or not isinstance(experts, nn.Module):
            raise refusal(family, f"its {type(module).__name__} {name!r} has no layer number or no `experts` beside it")
        number = int(layer[1])
        if number in sites:
            raise refusal(family, f"layer {number} has more than one router, {sites[number].name!r} and {name!r}")
        sites[number] = RouterSite(module, name, number, modules[block], experts)
        served.add(f"{block}.experts".removeprefix("."))
    unserved = [name for name in modules if name.endswith(".experts") and name not in served]
    if unserved:
        raise refusal(family, f"no router that transformers records serves {unserved[0]!r}")
    yield from (sites[layer] for layer in sorted(sites))


def _router_classes(model: PreTrainedModel, family: str) -> Iterator[tuple[type[nn.Module], str]]:
    """Yield the recorded router classes, each with a part that the module's dotted name must hold."""
    for module in model.modules():
        recorder: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is None:
            continue
        kind = getattr(recorder, "target_class", recorder)
        if not isinstance(kind, type):
            kinds = ", ".join(each.target_class.__name__ for each in recorder)
            raise refusal(family, f"transformers records more than one kind of router for it ({kinds})")
        part = getattr(recorder, "layer_name", None)
        yield kind, f".{part.strip('.')}." if part else ""


def _origin(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "name_or_path", "") or "model")
