"""A batch that does not fit in memory is split, says so, and gives the same experts; a lone sequence names the flag."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from collection.collector import collect
from collection.settings import CollectSettings
from collection.tracing import is_out_of_memory
from groundwork.errors import ExpertSpeculationError
from traces.manifest import read_manifest
from traces.reader import TraceDataset
from traces.verify import verify

Make = Callable[..., CollectSettings]


@pytest.fixture
def memory() -> Iterator[dict[str, int]]:
    """Return the limit of sequences in a batch, beyond which any model's embedding runs out of memory; set it."""
    limit = {"sequences": 1000}

    def refuse(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and args[0].shape[0] > limit["sequences"]:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {args[0].shape[0]} sequences")

    handle = register_module_forward_pre_hook(refuse)
    yield limit
    handle.remove()


@pytest.fixture
def texts(tmp_path: Path, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]) -> str:
    return str(write_texts(tmp_path / "texts.jsonl", make_texts(30, longest=30)))


def test_a_batch_is_halved_until_it_fits_which_the_manifest_and_the_card_say(
    make_settings: Make, texts: str, memory: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"datasets": texts, "target_traces": 11, "batch_size": 7}
    whole = list(TraceDataset(collect(make_settings(**wanted)).run_dir).sequences())
    memory["sequences"] = 2
    run_dir = collect(make_settings(**wanted, output_dir=tmp_path / "split")).run_dir
    assert verify(run_dir) == []
    for left, right in zip(whole, TraceDataset(run_dir).sequences(), strict=True):
        assert np.array_equal(left.expert_ids_TLK, right.expert_ids_TLK)
        assert np.allclose(left.routing_weights_TLK, right.routing_weights_TLK, atol=1e-3)
    (line,) = read_manifest(run_dir)
    parts = [note.rpartition(" ran as ")[2] for note in line.notes]
    assert parts == ["1 + 2 + 2 + 2", "2 + 2"]
    assert line.notes[0].startswith("out of memory: the batch of 7 sequences from sequence ")
    assert capsys.readouterr().err.count("; lower --batch_tokens or --batch_size in the next run") == 2
    gaps = (run_dir / "README.md").read_text().partition("## Known gaps")[2]
    assert gaps.count("out of memory: the batch of 7 sequences") == 1


def test_a_sequence_that_does_not_fit_alone_is_named_with_a_remedy_and_nothing_is_left(
    make_settings: Make, texts: str, memory: dict[str, int], tmp_path: Path
) -> None:
    memory["sequences"] = 0
    settings = make_settings(datasets=texts, resume=True)
    with pytest.raises(
        ExpertSpeculationError,
        match=r"^sequence \d+ alone, \d+ tokens, does not fit in memory beside the model on cpu; "
        r"free memory and run again with --resume, or lower --max_length in a new run$",
    ):
        collect(settings)
    assert list((tmp_path / "run" / ".tmp").iterdir()) == list((tmp_path / "run" / "data").iterdir()) == []
    memory["sequences"] = 1000
    assert collect(settings).sequences == 8


def test_other_failures_of_the_model_are_not_taken_for_a_lack_of_memory(make_settings: Make, texts: str) -> None:
    def fail(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    handle = register_module_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            collect(make_settings(datasets=texts))
    finally:
        handle.remove()


def test_what_the_allocators_raise_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught_numpy:
        np.empty(2**60, np.uint8)
    assert is_out_of_memory(caught_numpy.value)
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_cuda_raises_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
