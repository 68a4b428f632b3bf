"""Every mixture-of-experts family of the installed transformers, with random weights and sizes of a few dozen.

Families are found in the library itself: a model type counts when its modeling file has an `...Experts` class or
records router logits. Sizes are found in each configuration by the names that transformers uses; only what no name
tells, because the default is missing, switches the experts off or is tied to other sizes, is listed in `_OWN`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

VOCABULARY = 97
_EXPERTS = re.compile(r"^class \w*Experts\w*\(|\"router_logits\": *[\[O]", re.MULTILINE)
_TOKEN_ID = re.compile(r".*token_(id|index)")
_SIZES = {
    r".*vocab_size.*": VOCABULARY,
    r"max_position_embeddings|max_seq_len|model_max_length": 64,
    r".*(num|n)_(.*_)?heads|(en|de)coder_attention_heads": 4,
    r"num_(hidden_)?layers|n_layers|depth|(en|de)coder_layers|num_decoder_layers": 4,
    r"image_size": 16,
    r"patch_size": 4,
    r".*(_rank|lowrank)": 64,
    r"(?!qk_head).*(head_dim|d_head)|d_kv|kv_channels|rotary_dim": 8,
    r"(num|moe_num)(_local)?_experts|n_routed_experts": 8,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts": 3,
    r"n_groups?|num_expert_group|topk_group": 2,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"sliding_window(_size)?|(.*_)?chunk_size|block_size|canvas_length": 16,
    r".*hidden_(size|dim)|d_model|adapter_(in|out)_dim|adapter_input_size|(.*_)?(in|out)put_dim": 64,
    r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|mlp_dim|intermediate_size_mlp|expert_dim)": 64,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_SECTIONS = _ROTARY | {"mrope_section": [2, 2, 4]}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_GEMMA = {"num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 64}
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 3},
    },
    "deepseek_v2": _DEEPSEEK | {"topk_method": "group_limited_greedy"},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
    },
    "diffusion_gemma_text": _GEMMA,
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3},
    "dots1": _DEEPSEEK,
    "dots3_note_text": {"layer_types": ["full_attention"] * 4},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "dense", "dense", "sparse"],
        "per_layer_config": {3: {"num_local_experts": 4, "num_experts_per_tok": 2}},
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 64], "rope_parameters": _SECTIONS},
    "gemma4_text": _GEMMA | {"enable_moe_block": True},
    "glm4v_moe_text": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 1.0}},
    "granitemoehybrid": {
        "mamba_d_head": 32,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 8, "moe_topk": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 4},
    "mimo_v2_flash": {"num_attention_heads": 8, "head_dim": 192, "v_head_dim": 128},
    "mistral4": {
        "rope_parameters": _ROTARY
        | {"llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}
    },
    "muse_spark_audio": {"hidden_sizes": [8] * 4, "depths": [1] * 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 95},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 16},
}


def model_types() -> Iterator[str]:
    """Yield the model types that a checkpoint may name and whose modeling file holds experts, in alphabetical order.

    Left out are parts that occur in checkpoints of another type only.
    """
    models = Path(transformers.__file__).parent / "models"

    def holds_experts(model_type: str) -> bool:
        files = (models / model_type_to_module_name(model_type)).glob("modeling_*.py")
        return any(_EXPERTS.search(file.read_text()) for file in files)

    found = [each for each in CONFIG_MAPPING_NAMES if holds_experts(each)]
    parts = {part.model_type for each in found for part in _parts(CONFIG_MAPPING[each]())}
    yield from sorted(each for each in found if each in MODEL_MAPPING_NAMES or each not in parts)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return the default configuration of a model type with small sizes, and `changes` at its top level."""
    kind = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = kind(**(_shrunk(kind()) | changes))
    return config


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return the base model with random weights, also where training would start from zeros or from uniform choices."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(tiny_config(model_type, **changes)).eval().requires_grad_(False)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("correction_bias", "expert_bias", "router.bias", "per_expert_scale")):
            tensor.add_(torch.randn(tensor.shape) * 0.05)
        elif name.endswith("tid2eid"):  # DeepSeek-V4: which experts a token id goes to
            tensor.copy_(torch.rand(len(tensor), 8).argsort(dim=1)[:, : tensor.shape[1]])
        elif re.search(r"(gate|router)(\.\w+)*\.weight$", name) and tensor.dim() == 2:
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return model


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from _parts(part)


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a configuration that must change, its parts' as dictionaries."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = _shrunk(value)
        elif name == "initializer_range":
            changes[name] = 0.3  # so that tokens differ in their experts and in what follows them
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), value)
            if re.fullmatch(r"(pad|bos|eos)_token_id", name):
                changes[name] = ("p", "b", "e").index(name[0])
            elif _TOKEN_ID.fullmatch(name):
                changes[name] = 90 + len(changes) % 6
            elif value > size:
                changes[name] = size
    return changes | _OWN.get(config.model_type, {})
