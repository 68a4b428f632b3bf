"""Tracing while a model writes: prompts are prefilled, then tokens decoded one by one with a key-value cache.

Every prompt is continued by exactly N tokens: tokens that end a text are withheld, as with `min_tokens` of serving
engines, since a plan must know how many tokens there will be. All N decoded tokens are fed to the model, the last one
too, so each has its routing. Prompts are padded on the left, which keeps distances within a sliding window right.
Shapes: B sequences, T positions of the longest prompt, N decoded tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from groundwork.errors import ConfigurationError
from moe.passes import BatchRouting
from moe.resident import ResidentTracer


class Decoder:
    """Continues prompts by `new_tokens` tokens with the language model of `tracer`, recording what its routers choose.

    `temperature` 0 takes the likeliest token. What the checkpoint's generation settings ask for beside (penalties,
    other samplers) is not used. Raises ConfigurationError for a model without a language-model head.
    """

    def __init__(self, tracer: ResidentTracer, new_tokens: int, temperature: float) -> None:
        self._tracer, self._new_tokens, self._temperature = tracer, new_tokens, temperature
        self._model: Any = tracer.model
        if not self._model.can_generate():
            raise ConfigurationError(
                f"{type(self._model).__name__} has no language-model head; choose a causal language model to generate"
            )
        settings = self._model.generation_config
        end_ids = self._model.config.get_text_config().eos_token_id if settings is None else settings.eos_token_id
        self._end_ids = torch.tensor([] if end_ids is None else end_ids, dtype=torch.long).reshape(-1)

    def trace(
        self,
        input_ids_BT: torch.Tensor,
        lengths_B: torch.Tensor,
        draws_BN: torch.Tensor,
        hidden_BX: torch.Tensor | None = None,
    ) -> BatchRouting:
        """Continue right-padded prompts and return the routing of prompts and decoded tokens.

        `draws_BN`: one uniform random number in [0, 1) for each token to be sampled. `hidden_BX` marks, over the T
        positions of the prompts, padded on the left, and N more, the tokens whose router inputs are kept. Raises as
        `recording` does.
        """
        B, T = input_ids_BT.shape
        device = self._model.device
        first_B = T - lengths_B.cpu()
        # Position t of a left-padded row is position t - first of the right-padded one; padding wraps around.
        left_BT = (torch.arange(T)[None, :] - first_B[:, None]) % T
        mask_BT = torch.arange(T)[None, :] >= first_B[:, None]
        choice = _Choice(self._temperature, self._end_ids.to(device), T, draws_BN.to(device))
        with self._tracer.recording(hidden_BX) as gathered, self._plain_settings():
            tokens_BX = self._model.generate(
                input_ids=input_ids_BT.cpu().gather(1, left_BT).to(device),
                attention_mask=mask_BT.to(device, torch.long),
                max_new_tokens=self._new_tokens + 1,  # the last one is not fed, and dropped
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([choice]),
            )
            routing = gathered(B, self._new_tokens + 1)
        return replace(
            routing,
            first_B=first_B,
            decoded_BN=tokens_BX[:, T : T + self._new_tokens].cpu(),
            withheld_B=choice.withheld_B.cpu(),
        )

    @contextmanager
    def _plain_settings(self) -> Iterator[None]:
        """Hide the checkpoint's generation settings, which `generate` would fill in wherever it is told nothing."""
        settings, self._model.generation_config = self._model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self._model.generation_config = settings


class _Choice(LogitsProcessor):
    """Leaves one token possible: the likeliest, or the one at which the cumulated probabilities reach the row's draw.

    One draw a token, whatever the other rows are, makes a sequence independent of its batch.
    """

    def __init__(self, temperature: float, end_ids: torch.Tensor, first: int, draws_BN: torch.Tensor) -> None:
        self._temperature, self._end_ids, self._first, self._draws_BN = temperature, end_ids, first, draws_BN
        self.withheld_B = torch.zeros(len(draws_BN), dtype=torch.bool, device=draws_BN.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self._first
        if step < self._draws_BN.shape[1]:  # what follows the last token is dropped
            self.withheld_B |= torch.isin(self._choose(scores, step), self._end_ids)
            scores = scores.index_fill(1, self._end_ids, -torch.inf)
            chosen_B = self._choose(scores, step)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)
        return scores

    def _choose(self, scores_BV: torch.Tensor, step: int) -> torch.Tensor:
        if self._temperature == 0:
            return scores_BV.argmax(dim=-1)
        cumulated_BV = (scores_BV.double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        # Relative to the whole, which rounding keeps from being exactly 1, so that there always is such a token.
        reached_B = self._draws_BN[:, step] * cumulated_BV[:, -1]
        return torch.searchsorted(cumulated_BV, reached_B[:, None], right=True).squeeze(1)
