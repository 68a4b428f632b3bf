"""Tiny random models of several mixture-of-experts families, and folders as their publishers lay them out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}
_MANY: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": _MANY | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _MANY | {"norm_topk_prob": True},
    "olmoe": _MANY,
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2},
    "glm4_moe": _LATENT | {"num_key_value_heads": 2, "n_group": 1, "topk_group": 1},
    "phimoe": {"num_local_experts": 6},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 16},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "jamba": {
        "num_experts": 6,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "rotary_dim": 8},
    "afmoe": _MANY | {"num_dense_layers": 1},
}


def tiny_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **(_SMALL | FAMILIES.get(family, {}) | changes))


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A base model with random weights; so are biases of routers, and routers that start as zeros."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(family, **changes)).eval().requires_grad_(False)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("correction_bias", "expert_bias", "router.bias")):
            tensor.copy_(torch.randn(tensor.shape) * 0.05)
        elif name.endswith("router.gate.weight"):
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return model


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    return tiny_model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a random model with a head, in several safetensors files with an index, and a tokenizer."""

    def saved(family: str = "mixtral", *, tokenizer: bool = True, **changes: Any) -> Path:
        folder = tmp_path / family
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
        model.save_pretrained(folder, max_shard_size="60KB")
        if tokenizer:
            words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
            words.pre_tokenizer = pre_tokenizers.Whitespace()
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
        return folder

    return saved


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three right-padded sequences: token ids [3, 11] and lengths [3]."""
    lengths = torch.tensor([11, 7, 3])
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(11)[None, :] < lengths[:, None], ids, 0), lengths


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
