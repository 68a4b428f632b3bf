"""Sampling text from a causal language model, to see what a mini-Mixtral has learned."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from groundwork.hardware import choose_device
from moe.source import find_source, read_tokenizer, refusing


def generate(
    model: str, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.8, device: str = "auto", seed: int = 0
) -> str:
    """Return the prompt and its continuation by at most `max_new_tokens` tokens.

    Args:
        model: a folder in transformers' layout, or a hub id.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.

    Raises:
        ConfigurationError: there is no language model.
    """
    target = choose_device(device)
    source = find_source(model, weights=True)
    tokenizer = read_tokenizer(source)
    with refusing(source, "language model"):
        language_model: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    language_model.to(target).eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(target)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = language_model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
