"""Traced routing against what the experts received, for batches with padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.norms import find_norms
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import find_routers

Build = Callable[..., PreTrainedModel]
Batch = tuple[torch.Tensor, torch.Tensor]


def trace(
    model: PreTrainedModel,
    batch: Batch,
    store: tuple[str, ...] = ("weights",),
    horizons: int = 0,
    lookahead_norm: str = "next",
) -> BatchRouting:
    with ResidentTracer(model, find_routers(model), store, horizons, lookahead_norm) as tracer:
        return tracer.trace(*batch)


def received_by_experts(model: PreTrainedModel, run: Callable[[], Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ids and weights, each [N, K], that each `experts` module was called with while `run` ran, in layer order."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        ids = next(each for each in tensors if not each.is_floating_point())
        weights = next(each for each in tensors if each.is_floating_point() and each.shape == ids.shape)
        calls.append((ids.clone(), weights.clone()))

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in experts]
    run()
    for handle in handles:
        handle.remove()
    return calls


def test_ids_and_weights_are_those_the_experts_received(build: Build, batch: Batch, family: str) -> None:
    model = build(family)
    traced: list[BatchRouting] = []
    received = received_by_experts(model, lambda: traced.append(trace(model, batch)))
    B, T, L, K = traced[0].expert_ids_BTLK.shape
    assert (*batch[0].shape, len(received)) == (B, T, L)
    assert len(torch.unique(traced[0].expert_ids_BTLK[..., 0])) > 2
    for layer, (ids_NK, weights_NK) in enumerate(received):
        ids_NK, weights_NK = ids_NK.reshape(B * T, K), weights_NK.reshape(B * T, K)
        for token in range(B * T):
            by_weight = sorted(range(K), key=lambda rank: -float(weights_NK[token, rank]))
            stored_ids = traced[0].expert_ids_BTLK[token // T, token % T, layer]
            stored_weights = traced[0].routing_weights_BTLK[token // T, token % T, layer]
            assert stored_ids.tolist() == ids_NK[token, by_weight].tolist()
            assert stored_weights.dtype == torch.float16
            assert torch.equal(stored_weights, weights_NK[token, by_weight].to(torch.float16))


def test_padding_does_not_change_the_routing_of_real_tokens(build: Build, batch: Batch, family: str) -> None:
    model = build(family)
    padded = trace(model, batch)
    for row, length in enumerate(batch[1].tolist()):
        alone = trace(model, (batch[0][row : row + 1, :length], torch.tensor([length])))
        assert torch.equal(alone.expert_ids_BTLK[0], padded.expert_ids_BTLK[row, :length])


def test_logits_are_the_routers_own(build: Build, batch: Batch, family: str) -> None:
    model = build(family)
    layout = find_routers(model)
    outputs: list[torch.Tensor] = []
    handles = [site.module.register_forward_hook(lambda m, a, out: outputs.append(out[0])) for site in layout.sites]
    routing = trace(model, batch, ("weights", "logits"))
    for handle in handles:
        handle.remove()
    assert routing.router_logits_BTLE is not None
    expected_BTLE = torch.stack(outputs).to(torch.float16).unflatten(1, batch[0].shape).permute(1, 2, 0, 3)
    assert torch.equal(routing.router_logits_BTLE, expected_BTLE)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "afmoe"])
def test_lookahead_is_a_later_router_applied_to_this_routers_input(build: Build, batch: Batch, family: str) -> None:
    model = build(family, num_hidden_layers=5)
    layout = find_routers(model)
    calls: list[tuple[Any, ...]] = []
    handles = [site.module.register_forward_pre_hook(lambda m, args: calls.append(args)) for site in layout.sites]
    routing = trace(model, batch, ("lookahead",), horizons=2, lookahead_norm="own")
    for handle in handles:
        handle.remove()
    assert len(calls) == layout.num_layers, "lookahead must not set off the hooks of the routers it borrows"
    assert routing.router_logits_BTLE is None
    assert routing.lookahead_logits_BTHLE is not None
    for horizon in (1, 2):
        for layer in range(layout.num_layers):
            stored_BTE = routing.lookahead_logits_BTHLE[:, :, horizon - 1, layer]
            if layer < horizon:
                assert not stored_BTE.any()
                continue
            router_input, *biases_of_source = calls[layer - horizon]
            biases_of_target = calls[layer][1:]
            assert len(biases_of_source) == len(biases_of_target)
            logits_NE = layout.sites[layer].module(router_input, *biases_of_target)[0]
            assert torch.equal(stored_BTE, logits_NE.to(torch.float16).unflatten(0, batch[0].shape))


def test_lookahead_under_the_next_norm_is_what_its_router_would_say_of_this_residual_stream(
    build: Build, batch: Batch, family: str
) -> None:
    model = build(family, num_hidden_layers=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all are ones, and so all alike, before any training
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    layout = find_routers(model)
    norms = find_norms(model, layout)
    residuals: list[torch.Tensor] = []
    shapes: list[torch.Size] = []  # some routers take [N, D] only, some [B, T, D]
    handles = [norm.register_forward_pre_hook(lambda m, args: residuals.append(args[0])) for norm in norms]
    handles += [
        site.module.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape)) for site in layout.sites
    ]
    routing = trace(model, batch, ("logits", "lookahead"), horizons=2)
    for handle in handles:
        handle.remove()
    # The first pass is the one in which the norms are found.
    residuals, shapes = residuals[layout.num_layers :], shapes[layout.num_layers :]
    assert len(residuals) == len(shapes) == layout.num_layers
    assert routing.lookahead_logits_BTHLE is not None
    assert routing.router_logits_BTLE is not None
    for layer, site in enumerate(layout.sites):
        for horizon in (0, 1, 2):
            if layer < horizon:
                assert not routing.lookahead_logits_BTHLE[:, :, horizon - 1, layer].any()
                continue
            stored_BTE = (
                routing.lookahead_logits_BTHLE[:, :, horizon - 1, layer]
                if horizon
                else routing.router_logits_BTLE[:, :, layer]  # 0 layers early it is the router itself
            )
            stream = norms[layer](residuals[layer - horizon])
            logits_NE = site.logits(stream.reshape(shapes[layer]))
            assert torch.equal(stored_BTE, logits_NE.to(torch.float16).reshape(stored_BTE.shape))


def test_a_router_that_reads_no_norm_is_refused_with_the_other_kind_of_lookahead(build: Build, batch: Batch) -> None:
    model: Any = build("mixtral")
    norm = model.layers[1].post_attention_layernorm
    model.layers[1].post_attention_layernorm = torch.nn.Identity()
    model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (norm(args[0]),))
    with pytest.raises(ConfigurationError, match=r"'layers\.1\.mlp\.gate' .*; use --lookahead_norm own$"):
        trace(model, batch, ("lookahead",), horizons=1)
    assert trace(model, batch, ("lookahead",), horizons=1, lookahead_norm="own").lookahead_logits_BTHLE is not None


def test_more_than_256_experts_need_wider_ids(build: Build, batch: Batch) -> None:
    routing = trace(build("mixtral", num_local_experts=300), batch)
    assert routing.expert_ids_BTLK.dtype == torch.int16
    assert int(routing.expert_ids_BTLK.max()) > 255


def test_experts_that_receive_something_else_are_noticed(build: Build, batch: Batch) -> None:
    model: Any = build("mixtral")
    experts = model.layers[1].mlp.experts
    original = experts.forward

    class Scaled(torch.nn.Module):
        """Stands between router and experts, like a family that scales the weights in its block."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.experts(hidden, ids, weights * 2)

    layout = find_routers(model)
    model.layers[1].mlp.experts = Scaled()
    with (
        ResidentTracer(model, layout) as tracer,
        pytest.raises(ConfigurationError, match="layer 1 receive other routing"),
    ):
        tracer.trace(*batch)
    assert experts.forward == original


def test_a_router_that_is_not_called_is_noticed(build: Build, batch: Batch) -> None:
    model: Any = build("mixtral")
    layout = find_routers(model)
    model.layers = model.layers[:2]
    model.config.num_hidden_layers = 2
    with ResidentTracer(model, layout) as tracer, pytest.raises(ExpertSpeculationError, match=r"layers\.2\.mlp\.gate"):
        tracer.trace(*batch)


class PassesByItsRouter(torch.nn.Module):
    """A block that computes its router's logits itself, and may leave out the experts' hooks too."""

    def __init__(self, block: Any, call_experts: bool) -> None:
        super().__init__()
        self.gate, self.experts, self.call_experts = block.gate, block.experts, call_experts

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        _, weights, ids = self.gate.forward(hidden_ND)
        experts = self.experts if self.call_experts else self.experts.forward
        return experts(hidden_ND, ids, weights).reshape(hidden_BTD.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
@pytest.mark.parametrize(
    ("call_experts", "message"),
    [
        (False, r"router 'layers\.\d\.mlp\.gate' was called in 0 of 1 forward passes"),
        (True, r"the experts beside router 'layers\.\d\.mlp\.gate' were called without it"),
    ],
)
def test_a_block_that_passes_by_its_router_stops_the_run(
    build: Build, batch: Batch, layers: tuple[int, ...], call_experts: bool, message: str
) -> None:
    model: Any = build("mixtral")
    for layer in layers:
        model.layers[layer].mlp = PassesByItsRouter(model.layers[layer].mlp, call_experts)
    with (
        ResidentTracer(model, find_routers(model)) as tracer,
        pytest.raises(ExpertSpeculationError, match=message),
    ):
        tracer.trace(*batch)


def test_hooks_are_gone_after_the_context(build: Build, batch: Batch) -> None:
    model = build("mixtral")
    layout = find_routers(model)
    with ResidentTracer(model, layout) as tracer:
        tracer.trace(*batch)
    assert not any(site.module._forward_hooks for site in layout.sites)
    assert not any(site.experts._forward_pre_hooks for site in layout.sites)
    with pytest.raises(ValueError, match="context"):
        tracer.trace(*batch)


@pytest.mark.parametrize(("store", "horizons"), [(("weight",), 0), (("lookahead",), 0), (("weights",), 1)])
def test_contradictory_settings_are_refused(build: Build, store: tuple[str, ...], horizons: int) -> None:
    model = build("mixtral")
    with pytest.raises(ValueError, match="store"):
        ResidentTracer(model, find_routers(model), store, horizons)
