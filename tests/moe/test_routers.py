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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 32}),  # its router returns no ids
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4}),  # its attention is routed too
        ("switch_transformers", {"d_model": 32, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2}),  # two stacks
    ],
)
def test_a_family_outside_the_adapter_is_refused_by_name(build: Build, family: str, changes: dict[str, Any]) -> None:
    model = build(family, **changes)
    with pytest.raises(ConfigurationError, match=f"{type(model).__name__} can not be traced"):
        find_routers(model)


def test_layers_with_different_experts_per_token_are_refused(build: Build) -> None:
    model: Any = build("mixtral")
    model.layers[1].mlp.gate.top_k = 3
    with pytest.raises(ConfigurationError, match="layers differ"):
        find_routers(model)


def test_experts_without_a_recorded_router_are_refused(build: Build) -> None:
    model: Any = build("mixtral")
    model.layers[1].mlp.gate = torch.nn.Linear(32, 8)
    with pytest.raises(ConfigurationError, match=r"serves 'layers\.1\.mlp\.experts'"):
        find_routers(model)
