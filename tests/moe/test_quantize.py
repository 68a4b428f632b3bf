"""Quantised loading: the experts shrink, the routers do not, and routing stays close to full precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import PreTrainedModel

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.load import load_model
from moe.quantize import PerExpertLinears, check_quantized, expert_bytes_per_parameter
from moe.resident import ResidentTracer
from moe.routers import find_routers

Save = Callable[..., Path]
Build = Callable[..., PreTrainedModel]
Batch = tuple[torch.Tensor, torch.Tensor]
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


def share_of_equal_experts(folder: Path, quantization: str, batch: Batch) -> float:
    ids: list[torch.Tensor] = []
    for mode in ("none", quantization):
        model = load_model(str(folder), device="cpu", quantization=mode).model
        with ResidentTracer(model, find_routers(model)) as tracer:
            ids.append(tracer.trace(*batch).expert_ids_BTLK)
    real_BT = torch.arange(batch[0].shape[1])[None, :] < batch[1][:, None]
    return float((ids[0][..., :, None] == ids[1][..., None, :]).any(-1).float()[real_BT].mean())


@pytest.mark.parametrize(
    ("mode", "most_bytes", "least_share"), [("nf4", 0.6, 0.5), ("nf4-double", 0.54, 0.5), ("int8", 1.1, 0.9)]
)
def test_experts_are_quantised_and_routers_are_not(
    save: Save, batch: Batch, mode: str, most_bytes: float, least_share: float
) -> None:
    folder = save("mixtral", **WIDE)
    loaded = load_model(str(folder), device="cpu", quantization=mode)
    assert (loaded.quantization, loaded.experts_implementation) == (mode, "per_expert_linear")
    assert 0.5 < expert_bytes_per_parameter(loaded.model) < most_bytes
    for site in find_routers(loaded.model).sites:
        assert isinstance(site.experts, PerExpertLinears)
        assert {parameter.dtype for parameter in site.module.parameters()} == {torch.float32}
    assert share_of_equal_experts(folder, mode, batch) > least_share


@pytest.mark.parametrize(("family", "gate"), [("afmoe", "mlp.router.gate"), ("qwen2_moe", "mlp.shared_expert_gate")])
def test_gates_that_are_linear_layers_stay_in_full_precision(save: Save, family: str, gate: str) -> None:
    model: Any = load_model(str(save(family)), device="cpu", quantization="nf4").model
    assert type(model.layers[1].get_submodule(gate)) is torch.nn.Linear
    assert type(model.layers[1].self_attn.q_proj) is bitsandbytes.nn.Linear4bit


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_quantised_weight_is_the_checkpoints_own(save: Save, family: str) -> None:
    folder = save(family, **WIDE, moe_intermediate_size=128)
    full: Any = load_model(str(folder), device="cpu").model
    quantised: Any = load_model(str(folder), device="cpu", quantization="nf4").model
    for layer in range(3):
        fused, split = full.layers[layer].mlp.experts, quantised.layers[layer].mlp.experts
        gate, up, down = split.names
        for expert in range(fused.gate_up_proj.shape[0]):
            expected = (*fused.gate_up_proj[expert].chunk(2), fused.down_proj[expert])
            for name, weight in zip((gate, up, down), expected, strict=True):
                stored = split.get_submodule(f"{expert}.{name}").weight
                dequantised = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
                assert float((dequantised - weight).norm() / weight.norm()) < 0.12  # NF4 of normal weights: about 0.09


def test_split_experts_compute_what_fused_ones_do(build: Build) -> None:
    model: Any = build("mixtral")
    fused = model.layers[0].mlp.experts
    split = PerExpertLinears(fused, ("w1", "w3", "w2"))
    for expert in range(8):
        gate, up = fused.gate_up_proj[expert].chunk(2)
        for name, weight in (("w1", gate), ("w3", up), ("w2", fused.down_proj[expert])):
            split.get_submodule(f"{expert}.{name}").weight.data = weight
    generator = torch.Generator().manual_seed(2)
    hidden, ids = torch.randn(20, 32, generator=generator), torch.randint(0, 8, (20, 2), generator=generator)
    weights = torch.rand(20, 2, generator=generator)
    torch.testing.assert_close(split(hidden, ids, weights), fused(hidden, ids, weights))


def test_auto_leaves_a_model_that_fits_as_it_is(save: Save) -> None:
    assert load_model(str(save()), device="cpu", quantization="auto").quantization == "none"


def test_experts_left_in_full_precision_are_noticed(build: Build) -> None:
    model: Any = build("mixtral")
    with pytest.raises(ExpertSpeculationError, match="still fused"):
        check_quantized(model, "nf4")
    for layer in model.layers:
        layer.mlp.experts = PerExpertLinears(layer.mlp.experts, ("w1", "w3", "w2"))
    with pytest.raises(ExpertSpeculationError, match=r"4\.00 bytes per parameter"):
        check_quantized(model, "nf4")


def test_experts_of_another_make_are_refused(save: Save) -> None:
    with pytest.raises(ConfigurationError, match="GptOssModel can not be split"):
        load_model(str(save("gpt_oss")), device="cpu", quantization="nf4")
