"""Loading published layouts, describing a model without its weights, and refusing what can not be traced."""

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import AutoModel

from groundwork.errors import ConfigurationError
from moe.description import describe_model
from moe.load import load_model, load_tokenizer
from moe.resident import ResidentTracer
from moe.routers import find_routers

Save = Callable[..., Path]
Batch = tuple[torch.Tensor, torch.Tensor]


def tensor_names(folder: Path) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def test_the_published_mixtral_layout_loads_and_traces_as_the_original(save: Save, batch: Batch) -> None:
    folder = save("mixtral")
    names = tensor_names(folder)
    assert "model.layers.0.block_sparse_moe.experts.7.w1.weight" in names
    assert len(set(names.values())) > 2
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys() == names.keys()
    original = AutoModel.from_pretrained(folder)
    loaded = load_model(str(folder), device="cpu")
    assert (loaded.name, loaded.revision, loaded.dtype, loaded.quantization) == ("mixtral", None, "float32", "none")
    assert loaded.attn_implementation == "sdpa"
    assert loaded.experts_implementation == "grouped_mm"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not hasattr(loaded.model, "lm_head")
    layouts = find_routers(original), find_routers(loaded.model)
    with ResidentTracer(original, layouts[0], ("logits",)) as first, ResidentTracer(loaded.model, layouts[1]) as second:
        expected, traced = first.trace(*batch), second.trace(*batch)
    assert torch.equal(expected.expert_ids_BTLK, traced.expert_ids_BTLK)
    assert torch.equal(expected.routing_weights_BTLK, traced.routing_weights_BTLK)


def test_gate_weights_are_the_files_own(save: Save) -> None:
    folder = save("mixtral")
    name = "model.layers.2.block_sparse_moe.gate.weight"
    with safe_open(tensor_names(folder)[name], "pt") as tensors:
        stored = tensors.get_tensor(name)
    layout = find_routers(load_model(str(folder), device="cpu").model)
    assert torch.equal(next(layout.sites[2].module.parameters()), stored)


def test_precision_and_implementations_are_those_asked_for(save: Save) -> None:
    loaded = load_model(
        str(save()), device="cpu", dtype="bfloat16", attn_implementation="eager", experts_implementation="eager"
    )
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert (loaded.dtype, loaded.attn_implementation, loaded.experts_implementation) == ("bfloat16", "eager", "eager")


def test_the_tokenizer_hash_tells_vocabularies_apart(save: Save) -> None:
    folder = save()
    before = load_model(str(folder), device="cpu").tokenizer_hash
    assert before == load_model(str(folder), device="cpu").tokenizer_hash
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w5"', '"other"'))
    assert before != load_model(str(folder), device="cpu").tokenizer_hash


def test_description_counts_what_loading_would_load(save: Save) -> None:
    folder = save("qwen2_moe")
    described = describe_model(str(folder))
    model = load_model(str(folder), device="cpu").model
    assert described["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert described["parameter_bytes"]["total"] == sum(parameter.nbytes for parameter in model.parameters())
    assert sum(described["parameters"].values()) == 2 * described["parameters"]["total"]
    assert described["parameters"]["experts"] == 3 * 8 * 3 * 64 * 64  # layers, experts, matrices, widths
    assert described["parameters"]["routers"] == 3 * 8 * 64
    assert described["parameters"]["embeddings"] == 97 * 64
    assert {"attention", "shared_experts"} <= described["parameters"].keys()
    assert (described["num_layers"], described["num_experts"], described["top_k"]) == (3, 8, 3)
    assert (described["family"], described["router_class"]) == ("Qwen2MoeModel", "Qwen2MoeTopKRouter")
    halved = describe_model(str(folder), "bfloat16")["parameter_bytes"]
    assert halved == {name: size // 2 for name, size in described["parameter_bytes"].items()}


def test_description_needs_no_weights(save: Save) -> None:
    folder = save("deepseek_v3")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert describe_model(str(folder))["moe_layers"] == [1, 2]


def test_the_real_mixtral_is_described_in_its_published_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "dtype": "bfloat16"}))
    described = describe_model(str(tmp_path))
    assert (described["num_layers"], described["num_experts"], described["top_k"]) == (32, 8, 2)
    head = 32_000 * 4096
    assert described["parameters"]["total"] + head == 46_702_792_704  # the model card's 46.7B
    sizes = {mode: round(size / 1e9, 1) for mode, size in described["quantized_bytes"].items()}
    assert sizes == {"int8": 46.7, "nf4": 26.4, "nf4-double": 24.2}


@pytest.mark.parametrize("load", [load_model, describe_model, load_tokenizer])
def test_a_missing_folder_is_refused(load: Callable[[str], object], tmp_path: Path) -> None:
    for path in (str(tmp_path / "absent"), "./absent", "models/mixtral/absent"):
        with pytest.raises(ConfigurationError, match="no such folder; give the folder of a saved model"):
            load(path)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model_type": "no_such_model"}', '{"model_type": "mixtral", '])
def test_an_unusable_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"its config\.json can not be used"):
        describe_model(str(tmp_path))


def test_a_dense_model_is_refused_before_its_weights_are_read(save: Save) -> None:
    folder = save("llama")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match=r"LlamaModel is a dense model.* such as Mixtral"):
        load_model(str(folder))


@pytest.mark.parametrize("load", [load_model, describe_model])
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            "llama4_text",
            "Llama4TextModel can not be traced: its Llama4Router does not return",
        ),
        ("jetmoe", r"JetMoeModel can not be traced: .*more than one kind of router.*JetMoeAttention"),
        ("qwen3_omni_moe", "qwen3_omni_moe can not be traced: transformers has no AutoModel for it"),
        ("switch_transformers", "SwitchTransformersModel can not be traced: it is an encoder and a decoder"),
    ],
)
def test_a_family_outside_the_adapter_is_refused_by_name_before_its_weights_are_read(
    tmp_path: Path, load: Callable[[str], object], family: str, reason: str
) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=reason):
        load(str(tmp_path))


def test_a_missing_tokenizer_is_refused(save: Save) -> None:
    with pytest.raises(ConfigurationError, match="holds no tokenizer"):
        load_model(str(save(tokenizer=False)))


def test_unusable_weights_are_refused(save: Save) -> None:
    folder = save()
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    file = tensor_names(folder)[name]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match="its weights can not be used"):
        load_model(str(folder))
    file.unlink()
    with pytest.raises(ConfigurationError, match="its weights can not be used"):
        load_model(str(folder))


def test_a_checkpoint_without_one_router_is_refused(save: Save) -> None:
    folder = save()
    name = "model.layers.1.block_sparse_moe.gate.weight"
    file = tensor_names(folder)[name]
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigurationError, match=r"lacks 1 of the model's tensors, first 'layers\.1\.mlp\.gate\.weight'"
    ):
        load_model(str(folder))


def test_pickled_weights_are_refused(save: Save) -> None:
    folder = save()
    model = AutoModel.from_pretrained(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match=r"mixtral: holds no \*\.safetensors files; fetch them, or save"):
        load_model(str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"formats \(pytorch_model\.bin\) are not read; fetch them, or"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "--dtype int4: unknown; use one of auto, float32"),
        ({"quantization": "nf5"}, "--quantization nf5: unknown; use one of none, int8, nf4"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"attn_implementation": "none_such"}, "--attn_implementation none_such: unknown; use one of eager, .*sdpa"),
        ({"attn_implementation": "paged|eager"}, r"paged\|eager: unknown; use one of eager, flash_[^|]*, sdpa$"),
        ({"experts_implementation": "none_such"}, "--experts_implementation none_such: unknown; use one of eager"),
    ],
)
def test_unknown_options_are_refused(save: Save, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_model(str(save()), **{"device": "cpu", **options})


def test_a_model_that_can_not_fit_is_refused_before_loading(save: Save) -> None:
    folder = save(num_hidden_layers=1)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"num_hidden_layers": 400, "hidden_size": 8192, "intermediate_size": 28672}
    (folder / "config.json").write_text(json.dumps(settings))
    reason = r"needs \d+\.\d GB as float32, and cpu has .*; even --quantization nf4-double needs \d+\.\d GB; use a"
    with pytest.raises(ConfigurationError, match=reason):
        load_model(str(folder), device="cpu")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_whose_package_is_missing_is_refused_by_its_option(save: Save) -> None:
    refused = "--attn_implementation flash_attention_2: can not be used here .*FlashAttention2.*; use sdpa or eager"
    with pytest.raises(ConfigurationError, match=refused):
        load_model(str(save()), device="cpu", attn_implementation="flash_attention_2")


def test_a_hub_out_of_reach_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"no such folder, and the hub can not be reached.*copy the model"):
        load_model("mistralai/Mixtral-8x7B-v0.1")
    assert time.monotonic() - started < 15
