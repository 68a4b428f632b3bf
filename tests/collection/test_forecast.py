"""What is foretold of the executions, and which is chosen."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_models import tiny_model

from collection.collector import collect, dry_run
from collection.forecast import Forecast, Possible, choose_execution, possible_executions
from collection.preparation import prepare
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from groundwork.profiles.execution import Rates
from moe import foresight
from moe.footprint import footprint
from moe.foresight import TooLargeError, foresee_loading
from moe.packed import pack
from traces.plan import Plan

Make = Callable[..., CollectSettings]


@pytest.fixture
def texts(tmp_path: Path, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]) -> str:
    return str(write_texts(tmp_path / "texts.jsonl", make_texts(20, longest=30)))


@pytest.fixture
def only_layers_fit(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave as much free as two layers take, which is less than the model does."""
    two = foresee_loading(str(model_dir), device="cpu", streamed=True).needed
    assert two < foresee_loading(str(model_dir), device="cpu").needed
    monkeypatch.setattr(foresight, "free_memory_bytes", lambda device: two)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all tensors but the head's."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        total += sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("lm_head"))
    return total


def test_the_footprint_of_a_checkpoint_is_what_its_files_hold(model_dir: Path) -> None:
    sizes = footprint(foresee_loading(str(model_dir), device="cpu"))
    assert sizes.outside + sum(sizes.layers) == stored_bytes(model_dir)
    assert sizes.last_moe_layer == len(sizes.layers) - 1
    half = footprint(foresee_loading(str(model_dir), device="cpu", dtype="bfloat16"), "bfloat16")
    assert (half.layers, 2 * half.state) == (sizes.layers, sizes.state)


def test_the_footprint_of_a_packed_model_is_near_what_its_files_hold(model_dir: Path, tmp_path: Path) -> None:
    pack(str(model_dir), tmp_path / "packed", quantization="int8", device="cpu")
    loading = foresee_loading(str(tmp_path / "packed"), device="cpu")
    sizes = footprint(loading)
    assert loading.stored == "int8"
    assert sizes.outside + sum(sizes.layers) == pytest.approx(stored_bytes(tmp_path / "packed"), rel=0.02)


@pytest.mark.parametrize(
    ("free", "forbidden", "expected"),
    [(1.2, False, "resident"), (1.05, False, "streamed"), (1.05, True, "resident")],
)
def test_auto_is_resident_where_the_model_takes_nine_tenths_or_nothing_else_is_possible(
    model_dir: Path, free: float, forbidden: bool, expected: str
) -> None:
    resident, streamed = (foresee_loading(str(model_dir), device="cpu", streamed=each) for each in (False, True))
    possible = {
        "resident": Possible(replace(resident, free=int(free * resident.needed)), None),
        "streamed": Possible(streamed, ConfigurationError("no") if forbidden else None),
    }
    assert choose_execution(possible) == expected


def test_auto_streams_what_does_not_fit_and_writes_what_a_resident_run_would(
    make_settings: Make,
    texts: str,
    tmp_path: Path,
    only_layers_fit: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = make_settings(datasets=texts, execution="auto", output_dir=tmp_path / "auto")
    with pytest.raises(TooLargeError, match=r"needs 0\.\d GB as float32.*, or --execution streamed, which takes 0\.\d"):
        dry_run(replace(wanted, execution="resident"))
    plan = dry_run(wanted)
    assert re.search(r"the model takes 0\.\d GB, and 0\.\d GB are free on cpu, so it is st", capsys.readouterr().err)
    assert plan["execution"] == "streamed"
    resident = plan["executions"]["resident"]
    assert resident["refusal"].startswith(str(wanted.model))
    assert resident["seconds"] is None
    assert {name: each["possible"] for name, each in plan["executions"].items()} == {
        "resident": False,
        "streamed": True,
    }
    collect(wanted)
    assert Plan.load(tmp_path / "auto").settings["execution"] == "streamed"
    monkeypatch.undo()
    collect(replace(wanted, output_dir=tmp_path / "whole"))
    assert Plan.load(tmp_path / "whole").settings["execution"] == "resident"
    assert Plan.load(tmp_path / "whole").fingerprint == Plan.load(tmp_path / "auto").fingerprint
    collect(replace(wanted, resume=True))
    assert Plan.load(tmp_path / "auto").settings["execution"] == "streamed"


@pytest.mark.parametrize("execution", ["auto", "resident"])
@pytest.mark.parametrize(
    ("changes", "option"),
    [({"generate": 2}, "--generate 2"), ({"batch_size": "auto", "batch_tokens": None}, "--batch_size auto")],
)
def test_what_forbids_streaming_is_named_where_the_whole_model_does_not_fit(
    make_settings: Make, texts: str, only_layers_fit: None, execution: str, changes: dict[str, Any], option: str
) -> None:
    wanted = rf"needs .* GB as float32, and cpu has .*, or --execution streamed without {option}, which takes "
    with pytest.raises(TooLargeError, match=wanted):
        dry_run(make_settings(datasets=texts, execution=execution, **changes))


def test_streaming_is_no_remedy_where_not_even_two_layers_fit(
    make_settings: Make, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "free_memory_bytes", lambda device: 1000)
    for execution in ("auto", "resident"):
        with pytest.raises(TooLargeError) as caught:
            dry_run(make_settings(datasets=texts, execution=execution))
        assert "or --execution streamed" not in str(caught.value)


def test_a_model_that_joined_gpus_can_not_hold_may_be_streamed_on_each(
    make_settings: Make, texts: str, model_dir: Path, gpus: Callable[..., None]
) -> None:
    two = foresee_loading(str(model_dir), device="cpu", streamed=True).needed
    gpus(two, 1000)
    with pytest.raises(TooLargeError, match="or --execution streamed with devices joined by commas, which takes"):
        dry_run(make_settings(datasets=texts, device="cuda:0+cuda:1"))


def test_bytes_read_and_on_disk_grow_with_the_passes(make_settings: Make, texts: str, model_dir: Path) -> None:
    options: dict[str, Any] = {"datasets": texts, "target_traces": 16, "shard_size_mb": 0.004}
    one, many = (dry_run(make_settings(**options, pass_tokens=tokens))["executions"] for tokens in (10**6, 1))
    assert one["streamed"]["passes"] == 1
    assert many["streamed"]["passes"] == dry_run(make_settings(**options))["shards"] > 2
    sizes = footprint(foresee_loading(str(model_dir), device="cpu"))
    more = (many["streamed"]["passes"] - 1) * sum(sizes.layers)
    assert many["streamed"]["read_bytes"] - one["streamed"]["read_bytes"] == more
    assert one["streamed"]["disk_bytes"] > many["streamed"]["disk_bytes"] > many["resident"]["disk_bytes"]
    assert one["resident"] == many["resident"]
    assert one["resident"]["seconds_per_million_tokens"] is None
    assert one["resident"]["device_bytes"] is None


@pytest.mark.parametrize("execution", ["resident", "streamed"])
def test_a_measured_run_says_what_it_was_foretold_and_what_it_took(
    make_settings: Make, texts: str, execution: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(datasets=texts, execution=execution, measure=True)
    needs = dry_run(settings)["executions"]
    assert all(each["seconds_per_million_tokens"] > 0 for each in needs.values())
    forecast = collect(settings).forecast
    assert forecast is not None
    foretold = forecast["foretold_to_start"] + forecast["foretold_to_trace"]
    taken = forecast["taken_to_start"] + forecast["taken_to_trace"]
    assert forecast["error"] == pytest.approx(foretold / taken - 1)
    assert f"an error of {forecast['error']:+.0%}" in capsys.readouterr().err
    assert collect(replace(settings, resume=True, measure=False)).forecast is None


def test_decoding_is_not_measured(make_settings: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"^--measure: times whole texts, not tokens one by one"):
        make_settings(measure=True, generate=3)


def test_a_family_that_can_not_be_run_layer_by_layer_is_not_measured(
    make_settings: Make, texts: str, model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "glm"
    tiny_model("glm_moe_dsa").save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"^--measure: layers of GlmMoeDsaModel can not be run one by one"):
        dry_run(make_settings(model=str(folder), datasets=texts, measure=True))


def test_seconds_are_told_only_of_the_precision_that_was_measured(make_settings: Make, texts: str) -> None:
    prepared = prepare(make_settings(datasets=texts))
    possible = possible_executions(prepared.settings)
    for mode, known in (("none", True), ("int8", False)):
        forecast = Forecast(prepared.settings, possible, prepared.layout, prepared.spec, Rates(1e9, 1e-9, 1e-6), mode)
        for execution in possible:
            assert (forecast.seconds(execution, prepared.layout.shards) is not None) == known
