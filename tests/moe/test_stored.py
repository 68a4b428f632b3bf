"""Checkpoints that their publishers quantised: read at the precision that is recorded, or refused beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.description import describe_model
from moe.load import load_model
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.stored import loaded_mode, settle_loaded, stored_mode

Save = Callable[..., Path]
Build = Callable[..., Any]
Batch = tuple[torch.Tensor, torch.Tensor]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # the magnitudes of E2M1; a nibble's high bit is the sign
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def trace(model: Any, batch: Batch) -> BatchRouting:
    with ResidentTracer(model, find_routers(model), ("weights", "logits")) as tracer:
        return tracer.trace(*batch)


def assert_same(left: BatchRouting, right: BatchRouting) -> None:
    assert torch.equal(left.expert_ids_BTLK, right.expert_ids_BTLK)
    assert torch.equal(left.routing_weights_BTLK, right.routing_weights_BTLK)
    assert left.router_logits_BTLE is not None
    assert right.router_logits_BTLE is not None
    assert torch.equal(left.router_logits_BTLE, right.router_logits_BTLE)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"} | settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def as_mxfp4(save: Save) -> tuple[Path, dict[str, torch.Tensor]]:
    """A gpt-oss checkpoint as published, with random blocks and scales, and the fused weights that they stand for."""
    folder = save("gpt_oss", shards=False)
    generator = torch.Generator().manual_seed(3)
    tensors, restored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor.bfloat16()
            continue
        num_experts, columns, rows = tensor.shape  # [E, in, out], and the published blocks lie along `in`
        codes = torch.randint(0, 16, (num_experts, rows, columns // 32, 32), generator=generator)
        exponents = torch.randint(120, 126, (num_experts, rows, columns // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        values = FP4[codes % 8] * torch.where(codes < 8, 1, -1) * 2.0 ** (exponents - 127)[..., None]
        restored[name] = values.reshape(num_experts, rows, columns).transpose(1, 2).bfloat16()
    rewrite(folder, tensors, quantization_config=MXFP4)
    return folder, restored


def test_a_published_gpt_oss_is_restored_on_a_cpu_and_traced_as_the_restored_weights_are(
    as_mxfp4: tuple[Path, dict[str, torch.Tensor]], batch: Batch
) -> None:
    folder, restored = as_mxfp4
    described = describe_model(str(folder))
    loaded = load_model(str(folder), device="cpu")
    assert (loaded.quantization, loaded.dtype, loaded.experts_implementation) == (
        "mxfp4-dequantized", "bfloat16", "grouped_mm"
    )  # fmt: skip
    parameters = {f"model.{name}": tensor for name, tensor in loaded.model.named_parameters()}
    assert restored.keys() <= parameters.keys()
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in restored.items())
    assert described["quantization"] == "mxfp4"
    experts = sum(each.numel() for each in restored.values())
    assert described["parameter_bytes"]["experts"] > 2 * experts  # and biases
    whole = described["parameter_bytes"]["total"]
    assert described["quantized_bytes"] == {"mxfp4": whole - 2 * experts + experts * 17 // 32}
    plain = {name: each for name, each in load_file(folder / "model.safetensors").items() if each.dtype != torch.uint8}
    rewrite(folder, plain | restored, quantization_config=None)
    assert_same(trace(loaded.model, batch), trace(load_model(str(folder), device="cpu").model, batch))


def test_the_published_gpt_oss_20b_is_described_and_weighed_as_what_it_is_run_as(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": MXFP4}))
    described = describe_model(str(tmp_path))
    head = 201_088 * 2880
    assert round((described["parameters"]["total"] + head) / 1e9, 1) == 20.9  # the model card
    assert round(described["parameter_bytes"]["total"] / 1e9, 1) == 40.7
    assert round((described["quantized_bytes"]["mxfp4"] + 2 * head) / 1e9, 1) == 13.8  # the published files
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"hidden_size": 28_800, "intermediate_size": 28_800, "quantization_config": MXFP4})
    )
    with pytest.raises(ConfigurationError, match=r"needs 38\d\d\.\d GB as bfloat16, and cpu has"):
        load_model(str(tmp_path), device="cpu")


def test_mxfp4_is_kept_on_no_cpu() -> None:
    assert loaded_mode("mxfp4", torch.device("cpu")) == "mxfp4-dequantized"
    assert loaded_mode("fp8", torch.device("cpu")) == loaded_mode("fp8", torch.device("cuda")) == "fp8-dequantized"


class WithoutKernels(Mxfp4GptOssExperts):
    """transformers' MXFP4 experts, computing with fused weights in place of its GPU kernels."""

    def __init__(self, config: Any, fused: torch.nn.Module) -> None:
        super().__init__(config)
        self.fused = fused

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.fused(hidden, ids, weights)  # type: ignore[no-any-return]


def test_the_mxfp4_block_calls_its_router_once_its_experts_are_marked(build: Build, batch: Batch) -> None:
    model = build("gpt_oss")
    expected = trace(model, batch)
    for layer in model.layers:
        layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, WithoutKernels(model.config, layer.mlp.experts))
    with pytest.raises(NameError, match="triton_kernels_hub"):  # transformers' own way, past the router
        trace(model, batch)
    settle_loaded(model, "mxfp4", set())
    assert_same(trace(model, batch), expected)
    with pytest.raises(ExpertSpeculationError, match="3 layers stayed in MXFP4 where mxfp4-dequantized was to be"):
        settle_loaded(model, "mxfp4-dequantized", set())
    with pytest.raises(ExpertSpeculationError, match="0 layers stayed in MXFP4 where mxfp4 was to be"):
        settle_loaded(build("gpt_oss"), "mxfp4", set())


def as_fp8(folder: Path, block: int, suffix: str = "_scale_inv") -> dict[str, torch.Tensor]:
    """Store a checkpoint's projections in FP8 with a scale a block; return what they stand for, by name."""
    tensors, restored = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            grid = [-(-size // block) for size in tensor.shape]
            scales = 0.5 + torch.rand(grid, generator=torch.Generator().manual_seed(4))
            each = scales[torch.arange(tensor.shape[0])[:, None] // block, torch.arange(tensor.shape[1]) // block]
            tensors[name] = (tensor / each).to(torch.float8_e4m3fn)
            tensors[f"{name}{suffix}"] = scales
            restored[name] = (tensors[name].float() * each).bfloat16()
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block] * 2}
    rewrite(folder, tensors, quantization_config=settings)
    return restored


@pytest.mark.parametrize("block", [32, 48])  # 48 does not divide 64: the last block of each row is cut off
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_a_checkpoint_in_fp8_is_restored_and_traced_as_the_restored_weights_are(
    save: Save, batch: Batch, family: str, block: int
) -> None:
    folder = save(family, shards=False)
    restored = as_fp8(folder, block)
    loaded = load_model(str(folder), device="cpu")
    assert (loaded.quantization, loaded.dtype) == ("fp8-dequantized", "bfloat16")
    assert describe_model(str(folder))["quantization"] == "fp8"
    plain = {name: each for name, each in load_file(folder / "model.safetensors").items() if "scale" not in name}
    rewrite(folder, plain | restored, quantization_config=None)
    reference = load_model(str(folder), device="cpu")
    assert reference.quantization == "none"
    expected = reference.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert_same(trace(loaded.model, batch), trace(reference.model, batch))


def test_scales_that_transformers_leaves_unused_are_noticed(save: Save) -> None:
    folder = save("qwen3_moe", shards=False)
    as_fp8(folder, 32, suffix="_scale")
    with pytest.raises(ConfigurationError, match=r"leaves \d+ scales of quantised weights unused, first"):
        load_model(str(folder), device="cpu")


def test_scales_of_another_grid_are_noticed(save: Save) -> None:
    folder = save("qwen3_moe", shards=False)
    as_fp8(folder, 32)
    rewrite(folder, load_file(folder / "model.safetensors"), quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigurationError, match="its weights can not be used"):
        load_model(str(folder), device="cpu")


def test_another_precision_of_a_quantised_checkpoint_is_refused(as_mxfp4: tuple[Path, Any]) -> None:
    for mode in ("nf4", "none"):
        with pytest.raises(ConfigurationError, match="already quantised, as mxfp4; leave --quantization out"):
            load_model(str(as_mxfp4[0]), device="cpu", quantization=mode)
    assert load_model(str(as_mxfp4[0]), device="cpu", quantization="auto").quantization == "mxfp4-dequantized"


@pytest.mark.parametrize("load", [load_model, describe_model])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "nvfp4", "quark", "modelopt"])
def test_other_formats_are_refused_before_weights_are_read(
    tmp_path: Path, load: Callable[[str], object], method: str
) -> None:
    config = tiny_config("mixtral")
    config.quantization_config = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    expected = (
        rf"^{tmp_path}: its weights are quantised by {method}, .*use the model's original checkpoint, with --quan"
    )
    with pytest.raises(ConfigurationError, match=expected):
        load(str(tmp_path))


def test_a_quantisation_named_for_the_text_part_alone_is_seen() -> None:
    config: Any = tiny_config("qwen3_vl_moe")
    assert stored_mode(config) is None
    config.text_config.quantization_config = {"quant_method": "fp8"}
    assert stored_mode(config) == "fp8"
