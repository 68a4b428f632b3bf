"""A packed model holds bit for bit what the quantised model holds, streams as that one routes, and shows any change."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_config
from transformers import AutoModel, AutoModelForCausalLM

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from moe import packed
from moe.description import describe_model, sketch_model
from moe.foresight import foresee_loading
from moe.load import load_model
from moe.packed import pack, packed_bytes
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.source import find_source
from moe.streaming.captured import unpack
from moe.streaming.load import open_layered
from moe.streaming.tracer import StreamedTracer

Save = Callable[..., Path]
Copy = Callable[[Path, Path, str], None]
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


def resident(folder: Path, batch: Batch) -> BatchRouting:
    model = load_model(str(folder), device="cpu", quantization="auto").model
    with ResidentTracer(model, find_routers(model), ("weights", "logits")) as tracer:
        return tracer.trace(*batch)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


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
    save: Save, save_copy: Copy, tmp_path: Path, family: str, mode: str
) -> None:
    folder = save(family, **WIDE, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    pack(str(folder), tmp_path / "packed", quantization=mode, device="cpu")
    save_copy(folder, tmp_path / "copy", mode)
    ours, theirs = tensors(tmp_path / "packed"), tensors(tmp_path / "copy")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "packed" / name).read_text() == (tmp_path / "copy" / name).read_text(), name


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_what_is_quantised_outside_of_the_layers_keeps_its_scales(
    save: Save, save_copy: Copy, tmp_path: Path, mode: str
) -> None:
    """Of a model for text and images, that is the part that sees; it has no class of a language model of its own."""
    config = tiny_config("qwen3_vl_moe", num_hidden_layers=3)
    config.text_config.head_dim = 16  # bitsandbytes takes 4-bit rows of 64 on a CPU
    AutoModel.from_config(config).save_pretrained(tmp_path / "seeing")
    for path in save("mixtral").glob("tokenizer*.json"):
        shutil.copy(path, tmp_path / "seeing")
    pack(str(tmp_path / "seeing"), tmp_path / "packed", quantization=mode, device="cpu")
    save_copy(tmp_path / "seeing", tmp_path / "copy", mode)
    ours, theirs = tensors(tmp_path / "packed"), tensors(tmp_path / "copy")
    assert any("visual" in name and name.endswith(("SCB", "absmax")) for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert load_model(str(tmp_path / "packed"), device="cpu").quantization == mode


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


@pytest.mark.parametrize("trace", [streamed, resident])
@pytest.mark.parametrize("name", ["layer-00001.safetensors", "outside-layers.safetensors"])
def test_a_flipped_bit_is_found_before_anything_is_traced(
    made: Path, batch: Batch, name: str, trace: Callable[[Path, Batch], BatchRouting]
) -> None:
    path = made / name
    flip_a_bit(path)
    with pytest.raises(ConfigurationError, match=rf"^{path}: its sha256 is \w+\.\.\., and packed\.json says \w+"):
        trace(made, batch)


def test_a_folder_without_an_index_is_an_ordinary_quantised_copy(made: Path) -> None:
    (made / "packed.json").unlink()
    flip_a_bit(made / "outside-layers.safetensors")
    assert load_model(str(made), device="cpu").quantization == "nf4"
    assert find_source(str(made)).name == "packed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no index of a packed model"),
        ('{"format_version": 1, "files": [3]}', "is no index of a packed model"),
        ('{"format_version": 2, "files": {}}', "has format version 2, not 1"),
    ],
)
def test_an_index_that_is_none_is_refused(made: Path, text: str, message: str) -> None:
    (made / "packed.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        find_source(str(made))


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "packed.json").read_text())
    (folder / "packed.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize("trace", [streamed, resident])
def test_a_file_that_the_index_does_not_know_is_refused(
    made: Path, batch: Batch, trace: Callable[[Path, Batch], BatchRouting]
) -> None:
    files = json.loads((made / "packed.json").read_text())["files"]
    del files["layer-00002.safetensors"]
    change_index(made, files=files)
    with pytest.raises(ConfigurationError, match=r"layer-00002\.safetensors: is not in packed\.json"):
        trace(made, batch)


def test_weights_that_would_be_read_in_place_of_the_packed_ones_are_refused(made: Path) -> None:
    shutil.copy(made / "layer-00001.safetensors", made / "model.safetensors")  # transformers reads no others then
    with pytest.raises(ConfigurationError, match=r"/model\.safetensors: is not in packed\.json"):
        load_model(str(made), device="cpu")


def test_a_file_that_is_missing_is_named(made: Path) -> None:
    (made / "layer-00002.safetensors").unlink()
    with pytest.raises(
        ConfigurationError, match=r"/layer-00002\.safetensors: is in packed\.json, but not in the folder"
    ):
        load_model(str(made), device="cpu")


def test_a_packed_model_is_called_what_the_packed_model_was_called(made: Path) -> None:
    """Its files are local all the same: none is fetched, and missing weights are refused before anything is loaded."""
    assert (find_source(str(made)).name, find_source(str(made)).revision) == ("mixtral", None)
    change_index(made, model="somewhere/Mixtral-8x7B", revision="0123abc")
    source = find_source(str(made), weights=True)
    assert (source.folder, source.name, source.revision) == (made, "somewhere/Mixtral-8x7B", "0123abc")
    loaded = load_model(str(made), device="cpu")
    assert (loaded.name, loaded.revision) == ("somewhere/Mixtral-8x7B", "0123abc")
    assert describe_model(str(made))["name"] == "somewhere/Mixtral-8x7B"
    for path in made.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"holds no \*\.safetensors files"):
        foresee_loading(str(made), device="cpu")


@pytest.mark.parametrize("facts", [{"model": each} for each in ("", "a/..", ".", 3, "\0")] + [{"revision": 3}])
def test_a_name_that_can_be_none_is_refused(made: Path, facts: dict[str, Any]) -> None:
    """The default run folder is called after the model, and must stay where it belongs."""
    change_index(made, **facts)
    with pytest.raises(ConfigurationError, match=r"packed\.json: is no index of a packed model \(ValueError"):
        find_source(str(made))


@pytest.mark.parametrize("open_model", [load_model, open_layered])
def test_no_quantisation_is_another_mode_than_the_packed_one(made: Path, open_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"already quantised, as nf4; leave --quantization out"):
        open_model(str(made), device="cpu", quantization="none")
    for mode in (None, "auto", "nf4"):
        loaded = open_model(str(made), device="cpu", quantization=mode)
        assert (loaded if open_model is load_model else loaded[0]).quantization == "nf4"


def test_permissions_follow_the_umask(save: Save, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        pack(str(save("mixtral", **WIDE)), tmp_path / "packed", device="cpu")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "packed").iterdir()} == {0o640}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_room_is_asked_for_before_anything_is_written(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, mode: str
) -> None:
    folder = save(family, **WIDE, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    source = find_source(str(folder))
    needed = packed_bytes(source, *sketch_model(source, "auto", AutoModelForCausalLM), mode)

    def free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": count})())

    free(needed - 1)
    place = tmp_path / "new" / "packed"
    with pytest.raises(ConfigurationError, match=rf"^{place}: about [\d.]+ MB are needed there and [\d.]+ MB are free"):
        pack(str(folder), place, quantization=mode, device="cpu")
    assert not place.parent.exists()
    free(needed)
    pack(str(folder), place, quantization=mode, device="cpu")
    taken = sum(path.stat().st_blocks * 512 for path in place.iterdir())
    assert 0.4 * needed < taken <= needed


@pytest.mark.parametrize("largest", [40_000, 100_000])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(save: Save, tmp_path: Path, largest: int) -> None:
    """A limit of file sizes stands in for the full disk: what lies outside of layers meets it, or a layer."""
    folder = save("mixtral", **WIDE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(
            ExpertSpeculationError, match=r"packed: can not be written \(File too large\); free disk"
        ) as said:
            pack(str(folder), tmp_path / "packed", device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.value.exit_code == 1
    assert list(tmp_path.iterdir()) == [folder]


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
