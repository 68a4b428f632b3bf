"""Sampling text from a mixture-of-experts language model, to see what a mini-Mixtral has learned."""

from typing import Any

import torch

from moe.load import load_model


def generate(
    model: str, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.8, device: str = "auto", seed: int = 0
) -> str:
    """Return the prompt and its continuation by at most `max_new_tokens` tokens.

    Args:
        model: a folder in transformers' layout, quantised copies among them, or a hub id.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.

    Raises:
        ConfigurationError: as `load_model` does.
    """
    loaded = load_model(model, device=device, language_model=True)
    language_model: Any = loaded.model
    tokenizer = loaded.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = language_model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
