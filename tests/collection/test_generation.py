"""`--generate`: runs whose sequences the model continues."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from collection.collector import collect, dry_run
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from moe.load import load_model
from moe.resident import ResidentTracer
from moe.routers import find_routers
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.plan import Plan
from traces.reader import TraceDataset
from traces.schema import SequenceTrace
from traces.verify import verify

Make = Callable[..., CollectSettings]
NEW = 7


@pytest.fixture
def settings(
    tmp_path: Path, make_settings: Make, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]
) -> CollectSettings:
    path = write_texts(tmp_path / "texts.jsonl", make_texts(30, longest=30))
    return make_settings(datasets=str(path), generate=NEW, temperature=1.0, max_length=40, shard_size_mb=0.006)


def read(run_dir: Path) -> list[SequenceTrace]:
    return list(TraceDataset(run_dir).sequences(columns=("weights", "lookahead", "tokens")))


def assert_equal(left: Path, right: Path) -> None:
    for a, b in zip(read(left), read(right), strict=True):
        assert (a.sequence_key, a.tokens_T) == (b.sequence_key, b.tokens_T)
        assert np.array_equal(a.token_ids_T, b.token_ids_T)
        assert np.array_equal(a.expert_ids_TLK, b.expert_ids_TLK)


def test_decoded_rows_follow_the_prompt_and_teacher_forcing_gives_the_same_experts(settings: CollectSettings) -> None:
    prompts = collect(replace(settings, generate=0, output_dir=settings.output_dir.with_name("prompts"))).run_dir
    foretold = dry_run(settings)
    result = collect(settings)
    assert foretold["tokens"] == result.tokens == sum(each.num_tokens for each in read(prompts)) + 8 * NEW
    assert verify(result.run_dir) == []
    loaded = load_model(settings.model, device="cpu")
    with ResidentTracer(loaded.model, find_routers(loaded.model)) as tracer:
        for sequence, prompt in zip(read(result.run_dir), read(prompts), strict=True):
            count = prompt.num_tokens
            assert sequence.phase_T.tolist() == [0] * count + [1] * NEW
            assert np.array_equal(sequence.token_ids_T[:count], prompt.token_ids_T)
            ids = torch.from_numpy(sequence.token_ids_T).long()[None]
            whole = tracer.trace(ids, torch.tensor([count + NEW]))
            assert np.array_equal(sequence.expert_ids_TLK, whole.expert_ids_BTLK[0].numpy())


def test_other_batches_and_a_resumed_run_give_the_same_text_and_another_seed_another(settings: CollectSettings) -> None:
    run_dir = collect(settings).run_dir
    for name, changes in (("single", {"batch_size": 1}), ("large", {"batch_tokens": 4096})):
        other = collect(replace(settings, **changes, output_dir=run_dir.with_name(name))).run_dir
        assert_equal(run_dir, other)
    lines = (run_dir / MANIFEST_NAME).read_bytes().splitlines(keepends=True)
    assert len(lines) > 1
    (run_dir / MANIFEST_NAME).write_bytes(lines[0])
    assert_equal(collect(replace(settings, resume=True)).run_dir, other)
    greedy = collect(replace(settings, temperature=0, output_dir=run_dir.with_name("greedy"))).run_dir
    assert not all(
        np.array_equal(a.token_ids_T, b.token_ids_T) for a, b in zip(read(run_dir), read(greedy), strict=True)
    )


def test_a_batch_that_does_not_fit_is_halved_and_its_text_stays_the_same(settings: CollectSettings) -> None:
    run_dir = collect(settings).run_dir

    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        if isinstance(module, torch.nn.Embedding) and args[0].shape == (2, 1):  # while it decodes
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = register_module_forward_pre_hook(refuse)
    try:
        other = collect(replace(settings, batch_size=2, output_dir=run_dir.with_name("halved"))).run_dir
    finally:
        handle.remove()
    assert all(line.notes for line in read_manifest(other))
    assert_equal(run_dir, other)


def test_sequences_that_would_have_ended_are_counted_in_the_manifest_and_on_the_card(
    settings: CollectSettings, model_dir: Path, tmp_path: Path
) -> None:
    run_dir = collect(replace(settings, temperature=1000.0, shard_size_mb=256.0)).run_dir  # any token, the end too
    (line,) = read_manifest(run_dir)
    assert len(line.notes) in (0, 1)
    loaded = load_model(str(model_dir), device="cpu", language_model=True)
    ends = loaded.model.generation_config.eos_token_id
    assert all(ends not in sequence.token_ids_T[sequence.phase_T == 1] for sequence in read(run_dir))
    for note in line.notes:
        assert note.endswith("of 8 sequences would have ended earlier; the tokens that end a text were withheld")


def test_prompts_leave_room_for_what_is_decoded(settings: CollectSettings, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model reads 256 tokens."""
    collect(replace(settings, max_length=256))
    assert "--max_length 256 is lowered to 249, before --generate 7" in capsys.readouterr().err
    with pytest.raises(
        ConfigurationError, match=r"--generate 249: .* no room for a prompt of --min_tokens 8; lower it"
    ):
        collect(replace(settings, generate=249, output_dir=settings.output_dir.with_name("other")))


def test_the_plan_says_how_tokens_were_chosen(settings: CollectSettings) -> None:
    plan = Plan.load(collect(settings).run_dir)
    assert (plan.settings["generate"], plan.settings["temperature"]) == (NEW, 1.0)
    with pytest.raises(ConfigurationError, match=r"temperature was 1\.0, is 0"):
        collect(replace(settings, temperature=0, resume=True))
