"""Quantised loading: the experts shrink, the routers do not, copies reload bit for bit, and routing stays close."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional, nn
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import PreTrainedModel

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe.description import describe_model
from moe.embedded import embedded_model
from moe.foresight import most_precise
from moe.load import load_model
from moe.quantize import check_quantized, expert_bytes_per_parameter
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.split_experts import PerExpertLinears, Split

Save = Callable[..., Path]
Build = Callable[..., PreTrainedModel]
Batch = tuple[torch.Tensor, torch.Tensor]
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
MODES = ["int8", "nf4", "nf4-double"]
TEXT = " ".join([json.__doc__ or "", shutil.copytree.__doc__ or "", shutil.rmtree.__doc__ or ""])


def routed(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with ResidentTracer(model, find_routers(model)) as tracer:
        return tracer.trace(*batch).expert_ids_BTLK


@pytest.fixture(scope="module")
def mini() -> str:
    folder = embedded_model()
    if folder is None:
        pytest.skip("the embedded mini-Mixtral is not there")
    return str(folder)


@pytest.fixture(scope="module")
def text(mini: str) -> tuple[Batch, torch.Tensor]:
    """Some English as one sequence, and the experts that the mini-Mixtral routes it to in full precision."""
    loaded = load_model(mini, device="cpu")
    ids = torch.tensor(loaded.tokenizer(TEXT)["input_ids"][:400])[None]
    batch = ids, torch.tensor([ids.shape[1]])
    return batch, routed(loaded.model, batch)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("mode", "most_bytes", "least_share"), [("int8", 1.02, 0.97), ("nf4", 0.57, 0.9), ("nf4-double", 0.52, 0.9)]
)
def test_a_trained_models_experts_shrink_and_its_routing_stays(
    mini: str, text: tuple[Batch, torch.Tensor], mode: str, most_bytes: float, least_share: float, device: str
) -> None:
    loaded = load_model(mini, device=device, quantization=mode)
    assert (loaded.quantization, loaded.experts_implementation) == (mode, "per_expert_linear")
    assert 0.5 < expert_bytes_per_parameter(loaded.model) < most_bytes
    for site in find_routers(loaded.model).sites:
        assert isinstance(site.experts, PerExpertLinears)
        assert {parameter.dtype for parameter in site.module.parameters()} == {torch.bfloat16}
    batch, expected = text
    ids = routed(loaded.model, batch)
    assert float((ids[..., :, None] == expected[..., None, :]).any(-1).float().mean()) > least_share


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_the_description_foretells_the_bytes(save: Save, family: str, mode: str) -> None:
    folder = str(save(family, **WIDE, moe_intermediate_size=64, shared_expert_intermediate_size=64))
    state = load_model(folder, device="cpu", quantization=mode).model.state_dict()
    tables = ("quant_map", "quant_state.bitsandbytes__nf4", "weight_format")  # the same few bytes for every matrix
    assert describe_model(folder)["quantized_bytes"][mode] == sum(
        tensor.nbytes for name, tensor in state.items() if not name.endswith(tables)
    )


@pytest.mark.parametrize(("family", "gate"), [("afmoe", "mlp.router.gate"), ("qwen2_moe", "mlp.shared_expert_gate")])
def test_gates_that_are_linear_layers_stay_in_full_precision(save: Save, family: str, gate: str) -> None:
    folder = save(family, **WIDE, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    model: Any = load_model(str(folder), device="cpu", quantization="nf4").model
    assert type(model.layers[1].get_submodule(gate)) is torch.nn.Linear
    assert type(model.layers[1].self_attn.q_proj) is nn.Linear4bit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_quantised_copy_reloads_bit_for_bit(
    save: Save, save_copy: Callable[[Path, Path, str], None], tmp_path: Path, batch: Batch, family: str, mode: str
) -> None:
    folder, copy = save(family, **WIDE, moe_intermediate_size=128), tmp_path / "copy"
    save_copy(folder, copy, mode)
    first, again = load_model(str(folder), device="cpu", quantization=mode), load_model(str(copy), device="cpu")
    assert (again.name, again.quantization, again.experts_implementation) == ("copy", mode, "per_expert_linear")
    expected, found = first.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert torch.equal(routed(first.model, batch), routed(again.model, batch))
    described = describe_model(str(copy))
    assert described["quantization"] == mode
    assert any("lm_head" in name for file in copy.glob("*.safetensors") for name in load_file(file))


def as_transformers_4(folder: Path, mode: str) -> dict[str, torch.Tensor]:
    """Quantise a saved checkpoint as transformers 4 did: every linear layer but the head, so the routers too.

    The layout is that of bitsandbytes' `Linear4bit` and `Linear8bitLt` state: statistics beside each weight, and of
    4-bit ones the rest as JSON in bytes. Returns the full-precision router weights, by name.
    """
    routers = {}
    for file in folder.glob("*.safetensors"):
        stored = {}
        for name, tensor in load_file(file).items():
            if not name.endswith(("_proj.weight", "gate.weight", "w1.weight", "w2.weight", "w3.weight")):
                stored[name] = tensor.bfloat16()
                continue
            prefix = name.removesuffix("weight")
            if mode == "int8":
                values, scales, _ = functional.int8_vectorwise_quant(tensor.half())
                stored |= {name: values, f"{prefix}SCB": scales, f"{prefix}weight_format": torch.tensor(0).byte()}
                if "gate" in name:
                    routers[name] = values.float() * scales[:, None] / 127
                continue
            packed, state = functional.quantize_4bit(
                tensor.bfloat16(), quant_type="nf4", compress_statistics=mode == "nf4-double"
            )
            rest: dict[str, Any] = {
                "quant_type": "nf4",
                "blocksize": 64,
                "dtype": "bfloat16",
                "shape": list(tensor.shape),
            }
            stored |= {name: packed, f"{name}.absmax": state.absmax, f"{name}.quant_map": state.code.clone()}
            if state.state2 is not None:
                stored |= {f"{name}.nested_absmax": state.state2.absmax}
                stored |= {f"{name}.nested_quant_map": state.state2.code.clone()}
                rest |= {
                    "nested_blocksize": 256,
                    "nested_dtype": "float32",
                    "nested_offset": float(state.offset),
                }
            stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(rest).encode())).byte()
            if "gate" in name:
                routers[name] = functional.dequantize_4bit(packed, state)
        save_file(stored, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    settings["quantization_config"] = {
        "_load_in_4bit": mode != "int8",
        "_load_in_8bit": mode == "int8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": mode == "nf4-double",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": mode != "int8",
        "load_in_8bit": mode == "int8",
        "quant_method": "bitsandbytes",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return routers


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_that_transformers_4_quantised_is_read(save: Save, batch: Batch, mode: str) -> None:
    folder = save("mixtral", shards=False, **WIDE)
    routers = as_transformers_4(folder, mode)
    assert len(routers) == 3
    stored = load_file(folder / "model.safetensors")
    loaded = load_model(str(folder), device="cpu")
    assert (loaded.quantization, loaded.dtype) == (mode, "bfloat16")
    for layer, site in enumerate(find_routers(loaded.model).sites):
        expected = routers[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.equal(next(site.module.parameters()), expected.bfloat16())
        for expert in range(8):
            for name in ("w1", "w2", "w3"):
                weight: Any = site.experts.get_submodule(f"{expert}.{name}").weight
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                assert torch.equal(weight.data, stored[f"{prefix}.weight"])
                scales = weight.SCB if mode == "int8" else weight.quant_state.absmax
                assert torch.equal(scales, stored[f"{prefix}.SCB" if mode == "int8" else f"{prefix}.weight.absmax"])
    assert len(routed(loaded.model, batch).unique()) > 2
    with pytest.raises(ConfigurationError, match=f"already quantised, as {mode}; leave --quantization out"):
        load_model(str(folder), device="cpu", quantization="nf4" if mode == "int8" else "int8")


def test_modules_that_transformers_4_left_whole_stay_whole(save: Save) -> None:
    folder = save("mixtral", shards=False, **WIDE)
    whole = load_file(folder / "model.safetensors")
    as_transformers_4(folder, "nf4")
    skipped = {"model.layers.1.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.3.w1"}
    kept = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not any(name.startswith(f"{module}.") for module in skipped)
    }
    kept |= {f"{module}.weight": whole[f"{module}.weight"].bfloat16() for module in skipped}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExpertSpeculationError, match=r"is in full precision where the configuration says"):
        load_model(str(folder), device="cpu")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["llm_int8_skip_modules"] = sorted(skipped)
    (folder / "config.json").write_text(json.dumps(settings))
    model: Any = load_model(str(folder), device="cpu").model
    assert torch.equal(
        model.layers[1].self_attn.q_proj.weight, whole["model.layers.1.self_attn.q_proj.weight"].bfloat16()
    )
    assert type(model.layers[0].mlp.experts.get_submodule("3.w1")) is torch.nn.Linear


def test_shapes_that_bitsandbytes_gets_wrong_are_refused_on_a_cpu(save: Save) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    assert error > 0.15, "bitsandbytes restores rows that blocks cross: check_quantizable need not refuse them any more"
    folder = str(save("mixtral", **WIDE | {"intermediate_size": 96}))
    with pytest.raises(ConfigurationError, match=r"nf4: on a CPU .* 4-bit matrices 96 wide and 64 high.*int8 or none"):
        load_model(folder, device="cpu", quantization="nf4")
    assert load_model(folder, device="cpu", quantization="int8").quantization == "int8"


def test_auto_takes_the_most_precise_mode_that_fits_with_room_for_activations() -> None:
    needed = {"none": 93, "int8": 47, "nf4": 27, "nf4-double": 25}
    assert [most_precise(needed, free) for free in (104, 103, 53, 52, 30, 29, 27)] == [
        "none", "int8", "int8", "nf4", "nf4", "nf4-double", "none"
    ]  # fmt: skip


def test_auto_leaves_a_model_on_a_cpu_as_it_is(save: Save) -> None:
    assert load_model(str(save()), device="cpu", quantization="auto").quantization == "none"


def test_experts_left_in_full_precision_are_noticed(build: Build) -> None:
    model: Any = build("mixtral")
    with pytest.raises(ExpertSpeculationError, match="still fused"):
        check_quantized(model, "nf4")
    for layer in model.layers:
        layer.mlp.experts = PerExpertLinears(layer.mlp.experts, Split(("w1", "w3"), "w2", stored_singly=True))
    with pytest.raises(ExpertSpeculationError, match=r"4\.00 bytes per parameter"):
        check_quantized(model, "nf4")


def test_experts_of_another_make_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    tiny_config("dbrx").save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="DbrxModel can not be split into linear modules"):
        load_model(str(tmp_path), device="cpu", quantization="nf4")
    assert describe_model(str(tmp_path))["quantized_bytes"] == {}
