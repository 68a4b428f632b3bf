"""The mini-Mixtral: sizes of a small `MixtralForCausalLM` that we train ourselves, and a count of its parameters."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from groundwork.errors import ConfigurationError


@dataclass(frozen=True)
class MiniSize:
    """One preset: the model's shape and the training that suits it.

    Lengths are in tokens; learning rates are peaks; `steps` optimizer steps of `batch_size` sequences each.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    sliding_window: int
    sequence_length: int
    batch_size: int
    steps: int
    tied_embeddings: bool
    experts: int = 8
    experts_per_token: int = 2
    learning_rate: float = 5e-3
    rope_theta: float = 10_000.0


SIZES = {
    "tiny": MiniSize(
        vocabulary=512, width=32, layers=4, heads=4, key_value_heads=2, intermediate=32, sliding_window=32,
        sequence_length=64, batch_size=8, steps=40, tied_embeddings=True,
    ),
    "demo": MiniSize(
        vocabulary=4096, width=256, layers=8, heads=8, key_value_heads=2, intermediate=256, sliding_window=128,
        sequence_length=256, batch_size=32, steps=1400, tied_embeddings=True,
    ),
    "172m": MiniSize(
        vocabulary=32_000, width=512, layers=8, heads=8, key_value_heads=2, intermediate=1365, sliding_window=1024,
        sequence_length=1024, batch_size=128, steps=10_000, tied_embeddings=False, learning_rate=2e-3,
    ),
}  # fmt: skip
"""`tiny` trains in seconds, for tests; `demo` is the embedded model; `172m` has the published 172.4 M parameters."""


def size(name: str) -> MiniSize:
    """Return a preset by name; raises `ConfigurationError` for an unknown one."""
    if name not in SIZES:
        raise ConfigurationError(f"--size '{name}' is unknown; known sizes: {', '.join(SIZES)}")
    return SIZES[name]


def mixtral_config(shape: MiniSize) -> MixtralConfig:
    """The transformers configuration of a preset; token ids 0, 1, 2 are `<unk>`, `<s>`, `</s>` as in Mixtral."""
    return MixtralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        max_position_embeddings=4 * shape.sequence_length,
        sliding_window=shape.sliding_window,
        tie_word_embeddings=shape.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=1,
        eos_token_id=2,
    )


def parameter_table(shape: MiniSize) -> list[tuple[str, int]]:
    """Count parameters by component, from the model itself built without memory; the last row is the total.

    Shared storage (tied embeddings) is counted once.
    """
    with torch.device("meta"):
        model = MixtralForCausalLM(mixtral_config(shape))
    counts = dict.fromkeys(("embeddings", "attention", "routers", "experts", "norms", "output head"), 0)
    for name, parameter in _unique_parameters(model):
        counts[_component(name)] += parameter.numel()
    return [*counts.items(), ("total", sum(counts.values()))]


def _unique_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    model.tie_weights()  # type: ignore[operator]
    return list(model.named_parameters(remove_duplicate=True))


def _component(name: str) -> str:
    rules = {
        "embed_tokens": "embeddings",
        "self_attn": "attention",
        "mlp.gate.": "routers",
        "mlp.experts": "experts",
        "norm": "norms",
        "lm_head": "output head",
    }
    return next(component for part, component in rules.items() if part in name)
