"""Sampling text from a causal language model, to see what a mini-Mixtral has learned."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        language_model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"--model {model}: no language model could be loaded ({reason}); check the path"
        ) from None
    language_model.to(target).eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(target)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = language_model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
