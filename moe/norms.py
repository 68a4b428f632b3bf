"""The normalisation before each router: the module whose output is the router's input, found by watching one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from groundwork.errors import ConfigurationError
from moe.routers import RouterLayout


def find_norms(
    model: PreTrainedModel, layout: RouterLayout, run: Callable[[torch.Tensor], object] | None = None
) -> tuple[nn.Module, ...]:
    """Return, for each router, the module beside its MoE block that turns the residual stream into the router's input.

    Runs the model on two tokens, or has `run` do so, given token ids [1, 2]. Raises ConfigurationError for a family in
    which a router reads anything else.
    """
    modules = dict(model.named_modules())
    outputs: list[tuple[nn.Module, torch.Tensor]] = []  # kept, so that no later tensor takes an earlier one's place
    inputs: dict[int, torch.Tensor] = {}
    handles = []

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(output, torch.Tensor) and output.shape == args[0].shape:
            outputs.append((module, output))

    for index, site in enumerate(layout.sites):

        def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
            inputs[index] = args[0] if args else next(iter(kwargs.values()))

        handles.append(site.module.register_forward_pre_hook(keep_input, with_kwargs=True))
        layer = modules[site.name.rpartition(".")[0].rpartition(".")[0]]
        handles += [child.register_forward_hook(keep_output) for child in layer.children() if child is not site.block]
    try:
        with torch.inference_mode():
            ids_BT = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            run(ids_BT) if run else model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    norms = []
    for index, site in enumerate(layout.sites):
        found = [module for module, output in outputs if index in inputs and _is_same(output, inputs[index])]
        if not found:
            raise ConfigurationError(
                f"--lookahead_norm next: router {site.name!r} of {type(model).__name__} does not read the output of a "
                "normalisation beside it; use --lookahead_norm own"
            )
        norms.append(found[-1])
    return tuple(norms)


def _is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()
