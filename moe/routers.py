"""Finding the routers of a mixture-of-experts model through the router class that transformers itself records.

Every MoE family of transformers 5 names, in `_can_record_outputs["router_logits"]`, the class whose output holds the
router logits. Where that class returns `(logits, weights, ids)` and an `experts` module beside it takes the latter two,
one adapter covers the family. All others are refused by name: tracing something else would be worse than no trace.

Shapes: N tokens (batch and position flattened), E experts, K experts per token, D hidden size.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from groundwork.errors import ConfigurationError


@dataclass(frozen=True)
class RouterSite:
    """One router of a model: its module, dotted name and model layer, and the MoE block and experts it serves."""

    module: nn.Module
    name: str
    model_layer: int
    block: nn.Module
    experts: nn.Module

    def logits(self, router_input: torch.Tensor) -> torch.Tensor:
        """Return the router's logits_NE for any hidden states, without setting off the hooks on its module."""
        extra = {name: getattr(self.block, name) for name in self.extra_arguments}
        logits_NE: torch.Tensor = self.module.forward(router_input, **extra)[0]
        return logits_NE

    @cached_property
    def extra_arguments(self) -> tuple[str, ...]:
        """Name what the router is called with beside its input: correction biases that the block keeps for it."""
        parameters = list(inspect.signature(type(self.module).forward).parameters.values())[2:]
        return tuple(
            each.name
            for each in parameters
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        )


@dataclass(frozen=True)
class RouterLayout:
    """The routers of a model, by layer, with what they have in common."""

    sites: tuple[RouterSite, ...]
    num_experts: int
    top_k: int
    router_class: str
    weights_normalized: bool

    @property
    def num_layers(self) -> int:
        return len(self.sites)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The model-layer index of each MoE layer; dense layers in between are left out."""
        return tuple(site.model_layer for site in self.sites)


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
    observed = {_signature(site): site for site in sites}
    profiles = {_profile(site, family) for site in observed.values()}
    if len(profiles) > 1:
        raise _refusal(family, f"its layers differ in experts or experts per token ({sorted(profiles)})")
    num_experts, top_k, normalized = profiles.pop()
    return RouterLayout(sites, num_experts, top_k, type(sites[0].module).__name__, normalized)


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
            raise _refusal(
                family, f"the experts of layer {site.model_layer} receive other {name} than its router gives"
            )


def _sites(model: PreTrainedModel, family: str) -> Iterator[RouterSite]:
    """Yield the routers by layer; raises ConfigurationError where the family does not fit the adapter."""
    wanted = list(_router_classes(model, family))
    sites: dict[int, RouterSite] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not any(isinstance(module, kind) and part in f".{name}." for kind, part in wanted):
            continue
        layer = re.search(r"(?:^|\.)(\d+)\.", name)
        block = modules[name.rpartition(".")[0]]
        experts = getattr(block, "experts", None)
        if layer is None or not isinstance(experts, nn.Module):
            raise _refusal(family, f"its router {name!r} has no layer number or no `experts` module beside it")
        if int(layer[1]) in sites:
            raise _refusal(family, f"layer {layer[1]} has more than one router")
        sites[int(layer[1])] = RouterSite(module, name, int(layer[1]), block, experts)
    served = {id(site.experts) for site in sites.values()}
    unserved = [name for name, module in modules.items() if name.endswith(".experts") and id(module) not in served]
    if unserved:
        raise _refusal(family, f"no router that transformers records serves {unserved[0]!r}")
    yield from (sites[layer] for layer in sorted(sites))


def _router_classes(model: PreTrainedModel, family: str) -> Iterator[tuple[type[nn.Module], str]]:
    """Yield the recorded router classes, each with a part that the module's dotted name must hold."""
    for module in model.modules():
        recorder: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is None:
            continue
        kind = getattr(recorder, "target_class", recorder)
        if not isinstance(kind, type):
            raise _refusal(family, "transformers records more than one kind of router logits for it")
        part = getattr(recorder, "layer_name", None)
        yield kind, f".{part.strip('.')}." if part else ""


def _signature(site: RouterSite) -> tuple[Any, ...]:
    """Tell routers apart that could differ in E, K or weights."""
    shapes = tuple(tuple(tensor.shape) for _, tensor in _tensors(site.module))
    settings = tuple(sorted((k, v) for k, v in vars(site.module).items() if isinstance(v, (int, float, bool, str))))
    return shapes, tuple(each for each in settings if each[0] not in ("layer_idx", "layer_index", "training"))


def _profile(site: RouterSite, family: str) -> tuple[int, int, bool]:
    """Return E, K and whether the weights sum to 1, observed on 16 random tokens."""
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        noise = torch.randn(tensor.shape, generator=generator)
        # Vectors are biases and gains. Matrices keep unit variance, so that no softmax saturates and hides its sum.
        return 1 + 0.1 * noise if tensor.dim() < 2 else noise / tensor.shape[-1] ** 0.5

    tensors = dict(_tensors(site.module))
    width = next((tensor.shape[-1] for tensor in tensors.values() if tensor.dim() == 2), None)
    extra = {name: getattr(site.block, name, None) for name in site.extra_arguments}
    missing = sorted(name for name, value in extra.items() if not isinstance(value, torch.Tensor))
    if width is None or missing:
        raise _refusal(family, f"its {type(site.module).__name__} is called with {missing or 'no weight matrix'}")
    with torch.device("cpu"), torch.no_grad():  # while a model loads, the default device is meta
        parameters = {f"router.{name}": random_like(tensor) for name, tensor in tensors.items()}
        arguments = {name: random_like(value) for name, value in extra.items() if isinstance(value, torch.Tensor)}
        tokens_ND = torch.randn(16, width, generator=generator)
        try:
            try:
                output = functional_call(_WithoutHooks(site.module), parameters, (tokens_ND,), arguments)
            except (RuntimeError, ValueError):  # some take [B, T, D] only
                output = functional_call(_WithoutHooks(site.module), parameters, (tokens_ND[None],), arguments)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _refusal(family, f"its {type(site.module).__name__} can not be called alone ({error})") from error
    if not (isinstance(output, tuple) and len(output) >= 3 and _is_routing(*output[:3])):
        raise _refusal(family, f"its {type(site.module).__name__} does not return (logits, weights, ids)")
    logits_NE, weights_NK, ids_NK = output[:3]
    sums = weights_NK.float().sum(dim=-1)
    return logits_NE.shape[-1], ids_NK.shape[-1], bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))


class _WithoutHooks(nn.Module):
    """Calls a router so that no hook on it, ours or others', takes the call for a batch."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.router.forward(*args, **kwargs)


def _is_routing(logits: Any, weights: Any, ids: Any) -> bool:
    if not all(isinstance(each, torch.Tensor) and each.dim() == 2 for each in (logits, weights, ids)):
        return False
    if ids.is_floating_point() or weights.shape != ids.shape or not logits.is_floating_point():
        return False
    distinct = all(len(set(row)) == len(row) for row in ids.tolist())
    return distinct and int(ids.min()) >= 0 and int(ids.max()) < logits.shape[-1] >= ids.shape[-1]


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _origin(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "name_or_path", "") or "model")


def _refusal(family: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{family} can not be traced: {reason}; choose a model of another family")
