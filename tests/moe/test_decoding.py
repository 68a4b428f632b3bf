"""Decoded tokens are what the model writes, and their routing is what the same text, given to it whole, has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from groundwork.errors import ConfigurationError
from moe.decoding import Decoder
from moe.load import load_model
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import find_routers

Save = Callable[..., Path]
Batch = tuple[torch.Tensor, torch.Tensor]
NEW = 9
EVERYTHING = ("weights", "logits", "lookahead")


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decode(
    model: PreTrainedModel, batch: Batch, temperature: float = 0.0, draws_BN: torch.Tensor | None = None
) -> BatchRouting:
    with ResidentTracer(model, find_routers(model), EVERYTHING, horizons=1) as tracer:
        return Decoder(tracer, NEW, temperature).trace(*batch, draws(len(batch[0])) if draws_BN is None else draws_BN)


def language_model(path: Path) -> PreTrainedModel:
    return load_model(str(path), device="cpu", language_model=True).model


def texts(batch: Batch, routing: BatchRouting) -> list[torch.Tensor]:
    """Return each prompt with what was decoded after it."""
    assert routing.decoded_BN is not None
    return [torch.cat([ids[:length], new]) for ids, length, new in zip(*batch, routing.decoded_BN, strict=True)]


def test_given_to_the_model_whole_the_text_has_the_same_experts_weights_logits_and_lookahead(
    save: Save, batch: Batch, decoding_family: str
) -> None:
    """In float32, where no two scores of these models are close enough for rounding to change their order."""
    model = language_model(save(decoding_family))
    decoded = decode(model, batch, 1.0)
    with ResidentTracer(model, find_routers(model), EVERYTHING, horizons=1) as tracer:
        for row, text in enumerate(texts(batch, decoded)):
            whole = tracer.trace(text[None], torch.tensor([len(text)]))
            own = slice(int(decoded.first_B[row]), None)
            assert torch.equal(decoded.expert_ids_BTLK[row, own], whole.expert_ids_BTLK[0])
            for left, right in (
                (decoded.routing_weights_BTLK, whole.routing_weights_BTLK),
                (decoded.router_logits_BTLE, whole.router_logits_BTLE),
                (decoded.lookahead_logits_BTHLE, whole.lookahead_logits_BTHLE),
            ):
                assert left is not None
                assert right is not None
                assert left[row, own].shape == right[0].shape
                assert torch.allclose(left[row, own].float(), right[0].float(), atol=4e-3)


@pytest.fixture(params=["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def decoding_family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_greedy_tokens_are_those_of_transformers_for_each_prompt_alone(save: Save, batch: Batch) -> None:
    path = save()
    decoded = decode(language_model(path), batch)
    reference = AutoModelForCausalLM.from_pretrained(path)
    for row, text in enumerate(texts(batch, decoded)):
        prompt = batch[0][row : row + 1, : int(batch[1][row])]
        alone = reference.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert torch.equal(alone[0], text)


def test_sampled_tokens_depend_on_their_own_draws_only(save: Save, batch: Batch) -> None:
    model = language_model(save())
    together = decode(model, batch, 1.0).decoded_BN
    assert together is not None
    for rows in ([0], [2], [2, 0]):
        part = (batch[0][rows], batch[1][rows])
        again = decode(model, part, 1.0, draws(3)[rows]).decoded_BN
        assert again is not None
        assert torch.equal(again, together[rows])
    other = decode(model, batch, 1.0, draws(3, seed=1)).decoded_BN
    assert other is not None
    assert not torch.equal(other, together)


def test_tokens_are_sampled_as_often_as_they_are_likely(save: Save) -> None:
    model = language_model(save())
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        likely_V = (model(prompt).logits[0, -1].double() / 2).softmax(-1)
    likely_V[2] = 0  # the token that ends a text
    likely_V /= likely_V.sum()
    count = 2000
    first_B = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None].expand(count, NEW)
    with ResidentTracer(model, find_routers(model)) as tracer:
        decoded = Decoder(tracer, 1, 2.0).trace(prompt.expand(count, 3), torch.full((count,), 3), first_B[:, :1])
    assert decoded.decoded_BN is not None
    often_V = torch.bincount(decoded.decoded_BN[:, 0], minlength=97) / count
    assert (often_V - likely_V).abs().max() <= 2 / count


def test_tokens_that_end_a_text_are_withheld_and_that_is_said(save: Save, batch: Batch) -> None:
    model = language_model(save())
    free = decode(model, batch)
    assert free.decoded_BN is not None
    assert free.withheld_B is not None
    end = int(free.decoded_BN[1, 3])
    assert not free.withheld_B[1]
    model.generation_config.eos_token_id = [end, 96]
    held = decode(model, batch)
    assert held.decoded_BN is not None
    assert held.withheld_B is not None
    assert held.withheld_B[1]
    assert held.decoded_BN.shape == (3, NEW)
    assert not torch.isin(held.decoded_BN, torch.tensor([end, 96])).any()
    assert torch.equal(held.decoded_BN[1, :3], free.decoded_BN[1, :3])


def test_the_checkpoints_own_generation_settings_do_not_matter(save: Save, batch: Batch) -> None:
    model = language_model(save())
    plain = decode(model, batch).decoded_BN
    model.generation_config.update(repetition_penalty=5.0, max_length=4, do_sample=True, eos_token_id=2)
    again = decode(model, batch).decoded_BN
    assert plain is not None
    assert again is not None
    assert torch.equal(plain, again)


def test_a_model_without_a_head_is_refused(save: Save, batch: Batch) -> None:
    model = load_model(str(save()), device="cpu").model
    with pytest.raises(ConfigurationError, match="MixtralModel has no language-model head"):
        decode(model, batch)
