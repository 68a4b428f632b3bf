"""A packed model holds bit for bit what the quantised model holds, streams as that one routes, and shows any change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from groundwork.errors import ConfigurationError
from moe import packed
from moe.load import load_model
from moe.packed import pack
from moe.passes import BatchRouting
from moe.quantized_copy import save_quantized
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.streaming.captured import unpack
from moe.streaming.load import open_layered
from moe.streaming.tracer import StreamedTracer

Save = Callable[..., Path]
Batch = tuple[torch.Tensor, torch.Tensor]
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
MODES = ["nf4", "nf4-double", "int8"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def streamed(folder: Path, batch: Batch) -> BatchRouting:
    _, layered = open_layered(str(folder), device="cpu", quantization="auto")
    hidden, shown = None, []
    with StreamedTracer(layered, ("weights", "logits")) as tracer, tracer.layers() as layers:
        for index in layers:
            hidden, of_layer = tracer.run(index, *batch, hidden)
            shown.append(of_layer)
    return unpack(shown, len(batch[0]), layered.layout.num_experts, 0)


def assert_equal(left: BatchRouting, right: BatchRouting) -> None:
    assert torch.equal(left.expert_ids_BTLK, right.expert_ids_BTLK)
    assert torch.equal(left.routing_weights_BTLK, right.routing_weights_BTLK)
    assert left.router_logits_BTLE is not None
    assert right.router_logits_BTLE is not None
    assert torch.equal(left.router_logits_BTLE, right.router_logits_BTLE)


@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("mixtral", mode) for mode in MODES), ("gpt_oss", "nf4-double"), ("qwen2_moe", "nf4"), ("glm4_moe", "int8")],
)
def test_a_packed_model_is_the_quantised_copy_tensor_for_tensor(
    save: Save, tmp_path: Path, family: str, mode: str
) -> None:
    folder = save(family, **WIDE, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    pack(str(folder), tmp_path / "packed", quantization=mode, device="cpu")
    save_quantized(str(folder), tmp_path / "copy", quantization=mode, device="cpu")
    ours, theirs = tensors(tmp_path / "packed"), tensors(tmp_path / "copy")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "packed" / name).read_text() == (tmp_path / "copy" / name).read_text(), name


@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("mixtral", mode) for mode in MODES), ("gpt_oss", "nf4"), ("glm4_moe", "nf4-double")],
)
def test_a_packed_model_streams_as_the_original_routes_when_quantised(
    save: Save, batch: Batch, tmp_path: Path, family: str, mode: str
) -> None:
    folder = save(family, **WIDE, moe_intermediate_size=64, dtype="bfloat16")
    pack(str(folder), tmp_path / "packed", quantization=mode, device="cpu")
    loaded = load_model(str(folder), device="cpu", quantization=mode)
    with ResidentTracer(loaded.model, find_routers(loaded.model), ("weights", "logits")) as tracer:
        expected = tracer.trace(*batch)
    assert_equal(streamed(tmp_path / "packed", batch), expected)
    again = load_model(str(tmp_path / "packed"), device="cpu", quantization="auto")
    assert (again.quantization, again.dtype) == (mode, loaded.dtype)
    with ResidentTracer(again.model, find_routers(again.model), ("weights", "logits")) as tracer:
        assert_equal(tracer.trace(*batch), expected)


@pytest.fixture
def made(save: Save, tmp_path: Path) -> Path:
    pack(str(save("mixtral", **WIDE)), tmp_path / "packed", device="cpu")
    return tmp_path / "packed"


def test_each_layer_lies_in_a_file_of_its_own(made: Path) -> None:
    index = json.loads((made / "packed.json").read_text())
    assert index["quantization"] == "nf4"
    assert sorted(index["files"]) == [
        *(f"layer-0000{number}.safetensors" for number in range(3)),
        "outside-layers.safetensors",
    ]
    for number in range(3):
        with safe_open(made / f"layer-0000{number}.safetensors", framework="pt") as file:
            assert all(f".layers.{number}." in key for key in file.keys())  # noqa: SIM118
    listed = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert listed.keys() == tensors(made).keys()


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "outside-layers.safetensors"])
def test_a_flipped_bit_is_found_before_anything_is_traced(made: Path, batch: Batch, name: str) -> None:
    path = made / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"^{path}: its sha256 is \w+\.\.\., and packed\.json says \w+"):
        streamed(made, batch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no index of a packed model"),
        ('{"format_version": 1, "files": [3]}', "is no index of a packed model"),
        ('{"format_version": 2, "files": {}}', "has format version 2, not 1"),
    ],
)
def test_an_index_that_is_none_is_refused(made: Path, batch: Batch, text: str, message: str) -> None:
    (made / "packed.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        streamed(made, batch)


def test_a_file_that_the_index_does_not_know_is_refused(made: Path, batch: Batch) -> None:
    index = json.loads((made / "packed.json").read_text())
    del index["files"]["layer-00002.safetensors"]
    (made / "packed.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=r"layer-00002\.safetensors: is not in packed\.json"):
        streamed(made, batch)


def test_packing_refuses_what_can_not_work_and_leaves_nothing_behind(
    save: Save, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mixtral"
    with pytest.raises(ConfigurationError, match="packed: exists already"):
        pack(str(folder), made, device="cpu")
    with pytest.raises(ConfigurationError, match="is already quantised; stream it as it is"):
        pack(str(made), tmp_path / "twice", device="cpu")
    with pytest.raises(ConfigurationError, match="--quantization none: unknown; use one of nf4, nf4-double, int8"):
        pack(str(folder), tmp_path / "none", quantization="none", device="cpu")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigurationError, match="holds no tokenizer"):
        pack(str(folder), tmp_path / "tokenless", device="cpu")
    shutil.move(tmp_path / "tokenizer.json", folder)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "write_checksums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), tmp_path / "late", device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral", "packed"]
