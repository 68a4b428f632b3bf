"""What a router does, observed by running it alone on random parameters of its own shapes.

Families spell E and K differently in their configurations and scale weights in their own ways; what a router returns
does not depend on such names, nor on weights, which may still be on the meta device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from moe.router_site import RouterSite, refusal


@dataclass(frozen=True)
class RouterProfile:
    """What one router does with any token."""

    num_experts: int
    top_k: int
    weights_normalized: bool
    gives_probabilities: bool


def observe_router(site: RouterSite, family: str) -> RouterProfile:
    """Return what the router does with 512 random tokens; raises ConfigurationError where it can not be traced."""
    router = type(site.module).__name__
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():  # a table of expert ids: any that differ within a row will do
            return torch.arange(tensor.shape[-1] if tensor.dim() else 1).expand(tensor.shape)
        noise = torch.randn(tensor.shape, generator=generator)
        # Vectors are biases and gains. Matrices keep unit variance, so that no softmax saturates and hides its sum.
        return 1 + 0.1 * noise if tensor.dim() < 2 else noise / tensor.shape[-1] ** 0.5

    tensors = dict(_tensors(site.module))
    width = next((tensor.shape[-1] for tensor in tensors.values() if tensor.dim() == 2), None)
    if width is None:
        raise refusal(family, f"its {router} holds no weight matrix")
    with torch.device("cpu"), torch.no_grad():  # while a model loads, the default device is meta
        parameters = {f"router.{name}": random_like(tensor) for name, tensor in tensors.items()}
        tokens_ND = torch.randn(512, width, generator=generator)
        given = site.arguments(tokens_ND)
        given = {name: each if name == "input_ids" else random_like(each) for name, each in given.items()}
        try:
            try:
                output = functional_call(_WithoutHooks(site.module), parameters, (tokens_ND,), given)
            except (RuntimeError, ValueError, IndexError):  # some take [B, T, D] only
                output = functional_call(_WithoutHooks(site.module), parameters, (tokens_ND[None],), given)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise refusal(family, f"its {router} can not be called alone ({error})") from error
        routing = _read_routing(site, output)
    if routing is None:
        raise refusal(family, f"its {router} does not return (logits, weights, ids)")
    logits_NE, weights_NK, ids_NK = routing
    if not weights_NK.all():
        raise refusal(family, f"its {router} names an expert, with weight 0, where a token skips all experts")
    probabilities = bool((logits_NE >= 0).all()) and _sum_to_one(logits_NE)
    return RouterProfile(logits_NE.shape[-1], ids_NK.shape[-1], _sum_to_one(weights_NK), probabilities)


def router_signature(site: RouterSite) -> tuple[Any, ...]:
    """Tell routers apart that could differ in E, K or weights."""
    shapes = tuple(tuple(tensor.shape) for _, tensor in _tensors(site.module))
    settings = tuple(sorted((k, v) for k, v in vars(site.module).items() if isinstance(v, (int, float, bool, str))))
    settings = tuple(each for each in settings if each[0] not in ("layer_idx", "layer_index", "training"))
    return type(site.module), shapes, settings


def _sum_to_one(rows: torch.Tensor) -> bool:
    sums = rows.float().sum(dim=-1)
    return bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))


class _WithoutHooks(nn.Module):
    """Calls a router so that no hook on it, ours or others', takes the call for a batch."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        modules = [module for module in self.router.modules() if "forward" in vars(module)]
        aside = [vars(module).pop("forward") for module in modules]  # accelerate's, which move inputs to other devices
        try:
            return self.router.forward(*args, **kwargs)
        finally:
            for module, forward in zip(modules, aside, strict=True):
                module.forward = forward


def _read_routing(site: RouterSite, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return (logits, weights, ids), or None where the output is nothing of the kind."""
    try:
        logits, weights, ids = site.read(output)
    except (AttributeError, TypeError, ValueError):
        return None
    if not all(isinstance(each, torch.Tensor) and each.dim() == 2 for each in (logits, weights, ids)):
        return None
    if ids.is_floating_point() or weights.shape != ids.shape or not logits.is_floating_point():
        return None
    distinct = all(len(set(row)) == len(row) for row in ids.tolist())
    in_range = int(ids.min()) >= 0 and int(ids.max()) < logits.shape[-1] >= ids.shape[-1]
    return (logits, weights, ids) if distinct and in_range else None


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
