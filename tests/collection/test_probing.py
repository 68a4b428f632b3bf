"""`--batch_size auto` finds the largest batch that fits, once, and a resumed run keeps it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from collection import probing
from collection.collector import collect
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.manifest import MANIFEST_NAME
from traces.plan import Plan
from traces.verify import verify

Make = Callable[..., CollectSettings]
LENGTH = 24  # tokens at which all the texts are cut


class Memory:
    """Sequences in a batch beyond which any model's embedding runs out of memory, and the batches that were run."""

    def __init__(self) -> None:
        self.sequences = 1000
        self.tried: list[int] = []

    def refuse(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            self.tried.append(args[0].shape[0])
            if args[0].shape[0] > self.sequences:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {args[0].shape[0]} sequences")


@pytest.fixture
def memory() -> Iterator[Memory]:
    limit = Memory()
    handle = register_module_forward_pre_hook(limit.refuse)
    yield limit
    handle.remove()


@pytest.fixture
def settings(
    tmp_path: Path, make_settings: Make, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]
) -> CollectSettings:
    path = write_texts(tmp_path / "texts.jsonl", make_texts(40))
    return make_settings(
        datasets=str(path),
        target_traces=30,
        max_length=LENGTH,
        batch_size="auto",
        batch_tokens=None,
        store=("weights",),
    )


@pytest.mark.parametrize(
    ("limit", "tried"),
    [
        (11, [1, 2, 4, 8, 16, 12, 10, 11]),
        (1, [1, 2]),
        (16, [1, 2, 4, 8, 16, 30, 23, 19, 17]),
        (30, [1, 2, 4, 8, 16, 30]),
    ],
)
def test_the_largest_batch_that_fits_is_found_and_planned(
    settings: CollectSettings, memory: Memory, limit: int, tried: list[int]
) -> None:
    memory.sequences = limit
    run_dir = collect(settings).run_dir
    plan = Plan.load(run_dir)
    assert (plan.settings["batch_size"], plan.settings["batch_tokens"]) == (None, limit * LENGTH)
    assert memory.tried[: len(tried)] == tried
    assert max(memory.tried[len(tried) :]) == limit
    assert verify(run_dir) == []


def test_a_resumed_run_keeps_what_was_found_and_probes_no_more(settings: CollectSettings, memory: Memory) -> None:
    memory.sequences = 11
    run_dir = collect(settings).run_dir
    before = Plan.load(run_dir)
    (run_dir / MANIFEST_NAME).write_bytes(b"")
    memory.sequences = 6
    memory.tried.clear()
    collect(replace(settings, resume=True))
    assert memory.tried[0] == 11  # the first batch as planned, which is then halved
    assert Plan.load(run_dir).fingerprint == before.fingerprint
    assert verify(run_dir) == []


def test_a_sequence_that_does_not_fit_alone_is_refused_before_anything_is_written(
    settings: CollectSettings, memory: Memory
) -> None:
    memory.sequences = 0
    with pytest.raises(ExpertSpeculationError, match=r"auto: one sequence of 24 tokens does not fit .* --max_length$"):
        collect(settings)
    assert settings.output_dir is not None
    assert not (settings.output_dir / "plan.json").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux measures a CPU's peak anew")
def test_no_batch_is_tried_that_would_take_more_than_half_of_the_free_memory(
    settings: CollectSettings, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence takes 40 MiB beside what the tiny model takes, and the machine says that little is free.

    Less than 32 MiB at once might come from what malloc has kept, and would then not show.
    """
    weight = 40 * 2**20

    def weigh(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            torch.ones(args[0].shape[0] * weight // 4)

    monkeypatch.setattr(probing, "free_memory_bytes", lambda device: int(2 * 5.9 * weight))
    handle = register_module_forward_pre_hook(weigh)
    try:
        collect(settings)
    finally:
        handle.remove()
    assert max(memory.tried) <= 5
    assert settings.output_dir is not None
    assert Plan.load(settings.output_dir).settings["batch_tokens"] in (3 * LENGTH, 4 * LENGTH, 5 * LENGTH)


def test_auto_and_a_number_of_tokens_contradict_each_other(make_settings: Make) -> None:
    with pytest.raises(ConfigurationError, match="--batch_tokens 256: --batch_size auto finds"):
        make_settings(batch_size="auto")
