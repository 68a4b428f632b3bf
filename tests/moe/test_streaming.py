"""Layer by layer a model routes bitwise as in memory whole, in the memory of two layers; what can not is refused."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundwork.errors import ConfigurationError
from moe.load import load_model
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.streaming.captured import unpack
from moe.streaming.layered import LayeredModel
from moe.streaming.load import open_layered
from moe.streaming.tracer import StreamedTracer

Save = Callable[..., Path]
Batch = tuple[torch.Tensor, torch.Tensor]
ALL = ("weights", "logits", "lookahead")


@pytest.fixture
def other_batch() -> Batch:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    return ids, torch.tensor([9, 4])


def marks(batch: Batch) -> torch.Tensor:
    return (torch.arange(batch[0].numel()).reshape(batch[0].shape) % 3 == 0) & (batch[0] != 0)


def resident(folder: Path, batches: list[Batch], store: tuple[str, ...] = ALL, **options: Any) -> list[BatchRouting]:
    model = load_model(str(folder), device="cpu", **options).model
    with ResidentTracer(model, find_routers(model), store, 2 if "lookahead" in store else 0) as tracer:
        return [tracer.trace(*batch, marks(batch)) for batch in batches]


def streamed(
    folder: Path, batches: list[Batch], store: tuple[str, ...] = ALL, norm: str = "next", **options: Any
) -> list[BatchRouting]:
    _, layered = open_layered(str(folder), device="cpu", **options)
    horizons = 2 if "lookahead" in store else 0
    hidden: list[torch.Tensor | None] = [None] * len(batches)
    shown: list[list[dict[str, torch.Tensor]]] = [[] for _ in batches]
    with StreamedTracer(layered, store, horizons, norm) as tracer, tracer.layers() as layers:
        for index in layers:
            for number, batch in enumerate(batches):
                hidden[number], of_layer = tracer.run(index, *batch, hidden[number], marks(batch))
                shown[number].append(of_layer)
    return [
        unpack(each, len(batch[0]), layered.layout.num_experts, horizons)
        for each, batch in zip(shown, batches, strict=True)
    ]


def assert_bitwise_equal(left: list[BatchRouting], right: list[BatchRouting]) -> None:
    for one, two in zip(left, right, strict=True):
        for name, value in vars(one).items():
            other = getattr(two, name)
            assert (value is None) == (other is None), name
            if value is not None:
                assert value.dtype == other.dtype, name
                assert torch.equal(value, other), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_routing_equals_that_of_the_whole_model_bit_for_bit(
    save: Save, batch: Batch, other_batch: Batch, family: str, dtype: str, attention: str, experts: str
) -> None:
    folder = save(family)
    options = {"dtype": dtype, "attn_implementation": attention, "experts_implementation": experts}
    batches = [batch, other_batch]
    expected = resident(folder, batches, **options)
    assert len(expected[0].expert_ids_BTLK.unique()) > 4, "a router that never chooses compares nothing"
    assert expected[0].router_input_MLD is not None
    assert_bitwise_equal(streamed(folder, batches, **options), expected)


@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_quantised_while_reading_it_routes_as_the_quantised_model(
    save: Save, batch: Batch, other_batch: Batch, family: str, mode: str
) -> None:
    folder = save(family, hidden_size=64, head_dim=16, intermediate_size=128)
    batches = [batch, other_batch]
    store = ("weights", "logits")
    expected = resident(folder, batches, store, quantization=mode)
    assert_bitwise_equal(streamed(folder, batches, store, quantization=mode), expected)


def test_every_reading_of_a_layer_gives_the_same_bits(save: Save, batch: Batch) -> None:
    """Quantised layers carry states that a forward pass changes."""
    folder = save("mixtral", hidden_size=64, head_dim=16, intermediate_size=128)
    for mode in ("none", "int8", "nf4"):
        _, layered = open_layered(str(folder), device="cpu", quantization=mode)
        with StreamedTracer(layered) as tracer:
            runs = []
            for _ in range(2):
                with tracer.layers() as layers:
                    hidden = None
                    for index in layers:
                        hidden, _shown = tracer.run(index, *batch, hidden)
                runs.append(hidden)
        assert torch.equal(runs[0], runs[1])


def loaded_layers(layered: LayeredModel) -> set[int]:
    """The layers that hold a matrix of experts."""
    return {
        number
        for number, layer in enumerate(layered.layers)
        if any(not each.is_meta and each.dim() == 3 for each in layer.parameters())
    }


def test_at_most_two_layers_are_in_memory_and_the_next_is_read_while_one_computes(save: Save, batch: Batch) -> None:
    _, layered = open_layered(str(save("mixtral", num_hidden_layers=6)), device="cpu")
    read, seen = threading.Semaphore(0), []
    stock = layered.load

    def load(index: int) -> None:
        stock(index)
        seen.append(loaded_layers(layered))
        read.release()

    layered.load = load  # type: ignore[method-assign]
    with StreamedTracer(layered) as tracer:
        assert loaded_layers(layered) == set()
        assert all(len(each) <= 2 for each in seen)
        seen.clear()
        while read.acquire(blocking=False):
            pass
        with tracer.layers() as layers:
            hidden = None
            for index in layers:
                for _ in range(2 if index == 0 else int(index < 5)):
                    assert read.acquire(timeout=60), "the next layer is not read while this one is at work"
                assert index in loaded_layers(layered)
                hidden, _ = tracer.run(index, *batch, hidden)
        assert seen == [{0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}]
        assert loaded_layers(layered) == set()


@pytest.mark.parametrize("mode", ["none", "int8", "nf4"])
def test_nothing_holds_the_weights_of_a_layer_that_was_given_up(save: Save, batch: Batch, mode: str) -> None:
    """bitsandbytes' modules keep weights in states of their own once they have computed."""
    folder = save("mixtral", hidden_size=64, head_dim=16, intermediate_size=128)
    _, layered = open_layered(str(folder), device="cpu", quantization=mode)

    def held() -> int:
        gc.collect()
        tensors = {id(each): each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}
        return sum(
            each.nbytes
            for each in tensors.values()
            if not each.is_meta and each.dim() > 1 and each.numel() >= 128 * 64 // 2
        )

    with StreamedTracer(layered) as tracer:
        before = held()
        with tracer.layers() as layers:
            index = next(layers)
            tracer.run(index, *batch)
            assert held() > before
        assert held() == before


def test_leaving_early_ends_the_reading_and_an_error_of_reading_reaches_the_caller(save: Save, batch: Batch) -> None:
    folder = save("mixtral", num_hidden_layers=5)
    _, layered = open_layered(str(folder), device="cpu")
    with StreamedTracer(layered) as tracer:
        with tracer.layers() as layers:
            next(layers)
        assert loaded_layers(layered) == set()
        assert not any(thread.name == "read ahead" for thread in threading.enumerate())
        stock = layered.load

        def load(index: int) -> None:
            if index == 3:
                raise OSError("the disk is gone")
            stock(index)

        layered.load = load  # type: ignore[method-assign]
        taken = []
        with pytest.raises(OSError, match="the disk is gone"), tracer.layers() as layers:
            taken += list(layers)
        assert loaded_layers(layered) == set()


@pytest.mark.parametrize("family", ["gemma4_text", "glm_moe_dsa"])
def test_a_family_whose_layers_hand_on_more_than_hidden_states_is_refused(save: Save, family: str) -> None:
    _, layered = open_layered(str(save(family, num_hidden_layers=4)), device="cpu")
    with pytest.raises(ConfigurationError) as caught, StreamedTracer(layered):
        pass
    assert str(caught.value).startswith(f"--execution streamed: {family} can not be run so, for ")


@pytest.mark.parametrize(
    ("order", "factor", "reason"),
    [
        ((0, 1, 2), 2.0, "its forward changes hidden states between layers"),
        ((0, 2, 1), 1.0, "its forward does not call each layer once, in order"),
        ((0, 1, 1), 1.0, "its forward does not call each layer once, in order"),
    ],
)
def test_a_forward_that_does_more_than_to_call_its_layers_is_refused(
    save: Save, order: tuple[int, ...], factor: float, reason: str
) -> None:
    """No family of transformers does these two alone, so a Mixtral is given such a forward."""
    _, layered = open_layered(str(save("mixtral")), device="cpu")
    model: Any = layered.model

    def forward(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        hidden = model.embed_tokens(input_ids)
        for number in order:
            hidden = model.layers[number](hidden if factor == 1 else factor * hidden)
        return hidden

    model.forward = forward
    with pytest.raises(ConfigurationError, match=f"mixtral can not be run so, for {reason}; use resident"):
        StreamedTracer(layered).__enter__()


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Change, or take out, a tensor of a checkpoint in a single file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (key,) = (key for key in tensors if key.endswith(name))
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, path, {"format": "pt"})


def test_a_file_that_is_cut_off_or_no_safetensors_is_refused_by_name(save: Save) -> None:
    folder = save("mixtral", shards=False)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for part in (whole[:-100], whole[:50], b""):
        path.write_bytes(part)
        with pytest.raises(ConfigurationError, match=f"^{folder}: its weights can not be used .*; copy or download"):
            open_layered(str(folder), device="cpu")
    path.write_bytes(whole)
    _, layered = open_layered(str(folder), device="cpu")
    with path.open("rb+") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(ConfigurationError, match=f"^{path}: became shorter while it was read"), StreamedTracer(layered):
        pass


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "layers.1.block_sparse_moe.experts.2.w1.weight",
            None,
            "lacks 1 of the model's tensors, first 'layers.1.mlp",
        ),
        ("layers.2.self_attn.q_proj.weight", None, "lacks 1 of the model's tensors, first 'layers.2.self_attn.q_proj"),
        ("embed_tokens.weight", None, "lacks 1 of the model's tensors, first 'embed_tokens.weight'"),
        ("layers.0.self_attn.k_proj.weight", torch.zeros(3, 3), "not of the shape that config.json says"),
    ],
)
def test_a_checkpoint_that_lacks_tensors_or_has_others_is_refused_by_name(
    save: Save, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder = save("mixtral", shards=False)
    change(folder, name, value)
    _, layered = open_layered(str(folder), device="cpu")
    with pytest.raises(ConfigurationError, match=message), StreamedTracer(layered):
        pass
