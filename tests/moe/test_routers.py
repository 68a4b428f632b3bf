"""Which models are recognised, what is read off their routers, and which are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from groundwork.errors import ConfigurationError
from moe.routers import find_routers

Build = Callable[..., PreTrainedModel]


def test_every_covered_family_yields_experts_and_k_of_its_configuration(build: Build, family: str) -> None:
    model = build(family)
    layout = find_routers(model)
    config: Any = model.config
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    assert layout.num_experts == next(getattr(config, name) for name in names if hasattr(config, name))
    assert layout.top_k == config.num_experts_per_tok
    assert layout.router_class == type(layout.sites[0].module).__name__
    assert layout.moe_layers == tuple(sorted(layout.moe_layers))


@pytest.mark.parametrize(
    ("family", "moe_layers"),
    [("mixtral", (0, 1, 2)), ("deepseek_v3", (1, 2)), ("afmoe", (1, 2)), ("jamba", (1,))],
)
def test_dense_layers_in_between_are_left_out(build: Build, family: str, moe_layers: tuple[int, ...]) -> None:
    assert find_routers(build(family)).moe_layers == moe_layers


@pytest.mark.parametrize(
    ("family", "changes", "normalized"),
    [
        ("mixtral", {}, True),
        ("gpt_oss", {}, True),
        ("qwen3_moe", {"norm_topk_prob": True}, True),
        ("qwen3_moe", {"norm_topk_prob": False}, False),
        ("deepseek_v3", {"routed_scaling_factor": 2.5}, False),
        ("phimoe", {}, False),
    ],
)
def test_whether_weights_sum_to_one_is_observed(
    build: Build, family: str, changes: dict[str, Any], normalized: bool
) -> None:
    assert find_routers(build(family, **changes)).weights_normalized is normalized


def test_a_model_without_weights_is_described_alike(build: Build, family: str) -> None:
    model = build(family)
    with torch.device("meta"):
        sketch = AutoModel.from_config(model.config)
    real, meta = find_routers(model), find_routers(sketch)
    assert (real.num_experts, real.top_k, real.weights_normalized) == (
        meta.num_experts,
        meta.top_k,
        meta.weights_normalized,
    )
    assert [site.name for site in real.sites] == [site.name for site in meta.sites]


def test_a_dense_model_is_refused_as_such(build: Build) -> None:
    with pytest.raises(ConfigurationError, match="LlamaModel is a dense model"):
        find_routers(build("llama"))


def test_layers_with_different_experts_per_token_are_refused(build: Build) -> None:
    model: Any = build("mixtral")
    model.layers[1].mlp.gate.top_k = 3
    with pytest.raises(ConfigurationError, match="layers differ"):
        find_routers(model)


def test_experts_without_a_router_beside_them_are_refused(build: Build) -> None:
    model: Any = build("mixtral")
    del model.layers[1].mlp.gate
    with pytest.raises(ConfigurationError, match=r"serves 'layers\.1\.mlp\.experts'"):
        find_routers(model)


def test_a_router_of_another_make_is_refused(build: Build) -> None:
    model: Any = build("mixtral")
    model.layers[1].mlp.gate = torch.nn.Linear(64, 8)
    with pytest.raises(ConfigurationError, match="its Linear does not return"):
        find_routers(model)


def test_routers_of_two_kinds_stand_side_by_side(build: Build) -> None:
    layout = find_routers(build("deepseek_v4", num_hidden_layers=4))
    assert layout.router_class == "DeepseekV4HashRouter, DeepseekV4TopKRouter"
    assert layout.moe_layers == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"num_experts": 12, "num_experts_per_tok": 5, "shared_expert_intermediate_size": 64}),
        ("deepseek_v3", {"n_routed_experts": 12, "num_experts_per_tok": 5, "n_shared_experts": 2}),
    ],
)
def test_shared_experts_are_no_routed_experts(build: Build, family: str, changes: dict[str, Any]) -> None:
    layout = find_routers(build(family, **changes))
    assert (layout.num_experts, layout.top_k) == (12, 5)
    assert {site.logits(torch.zeros(1, 64)).shape for site in layout.sites} == {(1, 12)}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"num_experts": 300, "num_experts_per_tok": 10}),
        ("deepseek_v3", {"n_routed_experts": 512, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}),
    ],
)
def test_hundreds_of_experts_are_found(build: Build, family: str, changes: dict[str, Any]) -> None:
    layout = find_routers(build(family, **changes))
    assert (layout.num_experts, layout.top_k) == tuple(changes.values())[:2]


def test_probabilities_are_read_as_the_logits_behind_them(build: Build) -> None:
    layout = find_routers(build("gemma4_text"))
    assert all(site.gives_probabilities for site in layout.sites)
    site: Any = layout.sites[0]
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scaled = site.module.norm(hidden) * site.module.scale * site.module.scalar_root_size
    expected = site.module.proj(scaled)
    differences = site.logits(hidden) - expected
    torch.testing.assert_close(differences, differences[:, :1].expand_as(differences))
