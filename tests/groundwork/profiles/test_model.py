"""The models: counts equal those of transformers' own classes and of checkpoints, bytes those of moe's quantisation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DeepseekV2Config, GptOssConfig, MixtralConfig, PreTrainedModel

from groundwork.errors import ConfigurationError
from groundwork.profiles.loading import known_models, model_profile
from moe.description import count_by_component, describe_model, sketch_config
from moe.embedded import embedded_model
from moe.quantizable import quantized_bytes
from moe.stored import loaded_bytes

MIXTRAL = model_profile("mixtral-8x7b")
PUBLISHED_BILLIONS = {"mixtral-8x7b": 46.7, "gpt-oss-20b": 20.9, "deepseek-v2-lite": 15.7}
PUBLISHED_CONFIGS: dict[str, Any] = {
    "mixtral-8x7b": MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
    ),
    "gpt-oss-20b": GptOssConfig(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, attention_bias=True,
        tie_word_embeddings=False,
    ),
    "deepseek-v2-lite": DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, tie_word_embeddings=False,
    ),
}  # fmt: skip


def sketch(name: str) -> tuple[PreTrainedModel, Any]:
    return sketch_config(PUBLISHED_CONFIGS[name], torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_counts_are_those_of_the_published_configuration(name):
    profile = model_profile(name)
    model, layout = sketch(name)
    assert (profile.moe_layers, profile.num_experts, profile.top_k) == (
        layout.num_layers,
        layout.num_experts,
        layout.top_k,
    )
    experts = sum(each.numel() for each in layout.sites[0].experts.parameters())
    assert profile.num_experts * profile.expert_parameters == experts
    layer = model.get_submodule(f"layers.{layout.moe_layers[-1]}")
    assert profile.layer_parameters == sum(each.numel() for each in layer.parameters()) - experts
    assert profile.embedding_parameters == model.get_input_embeddings().weight.numel()
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(PUBLISHED_CONFIGS[name])
    assert profile.total_parameters == sum(each.numel() for each in whole.parameters())


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_totals_come_near_the_published_ones(name):
    assert model_profile(name).total_parameters / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_an_expert_has_the_bytes_that_quantised_loading_gives_it(name):
    profile = model_profile(name)
    model, layout = sketch(name)
    number = profile.moe_layers * profile.num_experts
    saved = {mode: profile.expert_bytes("bf16") - profile.expert_bytes(mode) for mode in ("int8", "nf4", "nf4-double")}
    for layer in model.modules():  # what is left to quantise are the experts
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = KeptLinear
    whole = count_by_component(model, layout)["total"][1]
    found = {mode: (whole - size) / number for mode, size in quantized_bytes(model, layout).items()}
    assert found == saved
    if "mxfp4" in profile.precisions:
        mxfp4 = (whole - loaded_bytes(model, layout, "mxfp4")) / number
        assert mxfp4 == profile.expert_bytes("bf16") - profile.expert_bytes("mxfp4")


class KeptLinear(torch.nn.Linear):
    """No nn.Linear by its type, and so not quantised."""


def test_the_mini_mixtral_is_the_checkpoint_that_is_shipped():
    profile, folder = model_profile("mini-mixtral"), embedded_model()
    assert folder is not None
    found = describe_model(str(folder))
    assert (profile.moe_layers, profile.num_experts, profile.top_k) == (
        found["num_layers"],
        found["num_experts"],
        found["top_k"],
    )
    experts = profile.moe_layers * profile.num_experts
    assert experts * profile.expert_parameters == found["parameters"]["experts"]
    assert profile.total_parameters == found["parameters"]["total"]  # the head is tied
    with safe_open(folder / "model.safetensors", "pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == profile.total_parameters
    assert profile.resident_bytes() + experts * profile.expert_bytes() == found["parameter_bytes"]["total"]
    first = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("model.layers.0."))
    assert first == profile.layer_parameters + profile.num_experts * profile.expert_parameters


def test_bytes_that_a_token_reads_leave_out_the_embeddings_unless_they_are_the_head():
    assert MIXTRAL.layer_read_bytes() == 2 * 41_984_000
    assert MIXTRAL.other_read_bytes() == 2 * (4096 * 32000 + 4096)
    assert MIXTRAL.resident_bytes() == 2 * (32 * 41_984_000 + 2 * 4096 * 32000 + 4096)
    mini = model_profile("mini-mixtral")
    assert mini.other_read_bytes() == 2 * (4096 * 256 + 256)


def test_the_default_precision_is_the_one_of_the_published_checkpoint():
    assert {name: model_profile(name).default_precision for name in known_models()} == {
        "mixtral-8x7b": "bf16", "gpt-oss-20b": "mxfp4", "deepseek-v2-lite": "bf16", "mini-mixtral": "bf16",
    }  # fmt: skip
    assert MIXTRAL.expert_bytes() == MIXTRAL.expert_bytes("bf16") == 352_321_536


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'mxfp4' is not in it; use one of bf16, int8, nf4, nf4-double"):
        MIXTRAL.expert_bytes("mxfp4")
    with pytest.raises(ConfigurationError, match="'fp8' is not in it"):
        replace(MIXTRAL, default_precision="fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_layers": 0}, "moe_layers is 0; give it a whole number above 0"),
        ({"expert_parameters": -5}, "expert_parameters is -5"),
        ({"top_k": 9}, "top_k is 9 of 8 experts"),
        ({"embedding_parameters": 262_148_097}, "embedding_parameters is 262148097"),
        ({"resident_bytes_per_parameter": 0.0}, "resident_bytes_per_parameter is 0 bytes per parameter"),
        ({"precisions": {"bf16": float("nan")}}, "bf16 is nan bytes per parameter"),
        ({"precisions": {}}, "use one of none"),
    ],
)
def test_counts_that_no_model_has_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=f"model profile 'Mixtral-8x7B': .*{message}"):
        replace(MIXTRAL, **change)
