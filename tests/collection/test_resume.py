"""`--resume` continues a run that would come out the same, names whatever would change it, and keeps `auto` decided."""

import json
import re
import shutil
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from collection.collector import collect
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from moe.packed import pack
from traces.manifest import MANIFEST_NAME
from traces.plan import Plan
from traces.reader import TraceDataset
from traces.run_folder import refuse_changes
from traces.verify import verify


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Return a folder that holds a model, two files of texts, and the run that was made of them."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(model_dir, folder / "tiny-mixtral")
    for name in ("a", "b"):
        texts = [f"{name} {number}: stones in the river, " + "and x=1; " * (number + 2) for number in range(9)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    collect(replace(settings_for(folder), resume=False))
    return folder


@pytest.fixture
def settings(finished: Path, tmp_path: Path) -> CollectSettings:
    """Return the settings that resume a copy of that run, model and texts of its own included."""
    return settings_for(shutil.copytree(finished, tmp_path / "copy"))


def settings_for(folder: Path) -> CollectSettings:
    return CollectSettings(
        model=str(folder / "tiny-mixtral"),
        datasets=f"{folder / 'a.jsonl'},{folder / 'b.jsonl'}",
        device="cpu",
        max_length=64,
        target_traces=8,
        batch_tokens=256,
        output_dir=folder / "run",
        resume=True,
    )


def refusal(settings: CollectSettings) -> str:
    """Return why the run can not be resumed, having checked that the folder stays as it was."""
    run_dir = settings.output_dir
    assert run_dir is not None
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError) as caught:
        collect(settings)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert str(caught.value).startswith(f"{run_dir}: --resume continues a run with unchanged settings only, and ")
    assert str(caught.value).endswith("; restore them or choose another --output_dir")
    return str(caught.value).partition("only, and ")[2].rpartition("; restore")[0]


def content(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return all that was traced, in stored order, as values that compare exactly."""
    return [
        tuple(each.tobytes() if isinstance(each, np.ndarray) else each for each in astuple(sequence))
        for sequence in TraceDataset(run_dir).sequences(columns=("weights", "tokens"))
    ]


def pretend(settings: CollectSettings, **changes: Any) -> None:
    """Make the saved plan one of a run that was started elsewhere."""
    run_dir = settings.output_dir
    assert run_dir is not None
    plan = Plan.load(run_dir)
    other = "0" * 32
    spec = replace(plan.spec, plan_fingerprint=other)
    replace(plan, fingerprint=other, spec=spec, settings=plan.settings | changes).save(run_dir)


def test_resume_starts_a_run_where_there_is_none_and_says_so(
    settings: CollectSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings.output_dir is not None
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        collect(replace(settings, output_dir=tmp_path / name))
        assert content(tmp_path / name) == content(settings.output_dir)
        assert f"{name}: holds no run to continue, so --resume starts one" in capsys.readouterr().err
    collect(settings)
    assert "starts one" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"target_traces": 9}, "target_traces was 8, is 9"),
        ({"max_length": 63}, "max_length was 64, is 63"),
        ({"min_tokens": 7}, "min_tokens was 8, is 7"),
        ({"batch_size": 2}, "batch_size was None, is 2"),
        ({"batch_tokens": 128}, "batch_tokens was 256, is 128"),
        ({"shard_size_mb": 0.5}, "shard_size_mb was 256.0, is 0.5"),
        ({"store": ()}, "store was ['weights'], is []"),
        (
            {"lookahead": 1},
            "store was ['weights'], is ['weights', 'lookahead']; lookahead was 0, is 1; "
            "lookahead_norm was None, is 'next'",
        ),
        ({"generate": 3}, "generate was None, is 3; temperature was None, is 0.8"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"seed": 1, "min_tokens": 7}, "min_tokens was 8, is 7; seed was 0, is 1"),
        ({"attn_implementation": "eager"}, "attn_implementation was 'sdpa', is 'eager'"),
        ({"experts_implementation": "eager"}, "experts_implementation was 'grouped_mm', is 'eager'"),
    ],
)
def test_a_changed_option_is_refused_by_name(settings: CollectSettings, changes: dict[str, Any], fields: str) -> None:
    assert refusal(replace(settings, **changes)) == fields


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"quantization": "int8"}, "quantization was 'none', is 'int8'"),
        ({"quantization": "int8", "execution": "streamed"}, "quantization was 'none', is 'int8'"),
        ({"quantization": "int8", "seed": 1}, "quantization was 'none', is 'int8'; seed was 0, is 1"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', is 'bfloat16'"),
    ],
)
def test_another_precision_is_refused_before_weights_are_read_without_what_follows_from_it(
    settings: CollectSettings, changes: dict[str, Any], fields: str
) -> None:
    (Path(settings.model) / "model.safetensors").write_bytes(b"no weights")
    refused = refusal(replace(settings, **changes))
    assert sorted(refused.split("; ")) == sorted(fields.split("; "))


def test_a_quantised_copy_of_the_model_is_refused_before_its_weights_are_read(
    settings: CollectSettings, tmp_path: Path
) -> None:
    copy = tmp_path / "copies" / "tiny-mixtral"
    pack(settings.model, copy, quantization="int8", device="cpu")
    for weights in copy.glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    assert refusal(replace(settings, model=str(copy))) == "quantization was 'none', is 'int8'"


def test_what_follows_from_other_settings_is_named_where_nothing_else_differs(settings: CollectSettings) -> None:
    assert settings.output_dir is not None
    saved = Plan.load(settings.output_dir)
    for changes, named in (
        ({"model_weights": "x", "bitsandbytes": "1"}, ["model_weights", "bitsandbytes"]),
        ({"model_weights": "x", "seed": 1, "execution": "streamed"}, ["seed"]),
    ):
        with pytest.raises(ConfigurationError) as caught:
            refuse_changes(settings.output_dir, saved, saved.settings | changes)
        assert sorted(re.findall(r"(\w+) was ", str(caught.value))) == sorted(named)
    refuse_changes(settings.output_dir, saved, saved.settings | {"execution": "streamed"})


def test_other_texts_are_refused(settings: CollectSettings) -> None:
    one, two = settings.datasets.split(",")
    assert refusal(replace(settings, datasets=one)).startswith("datasets was ['a', 'b'], is ['a']")
    assert refusal(replace(settings, datasets=f"{two},{one}")).startswith("datasets was ['a', 'b'], is ['b', 'a']")
    path = Path(one)
    path.write_text(path.read_text().replace("river", "brook"))
    changed = "changed since it was planned"
    assert refusal(settings) == f"the texts of a, or the tokens that they become, {changed}"
    path.write_text("")
    with pytest.raises(ConfigurationError, match="is empty"):
        collect(settings)
    path.write_text('{"text": "short"}\n')
    assert refusal(settings) == f"the texts of a, or the tokens that they become, {changed}"


def test_a_model_that_differs_in_the_sign_of_one_value_is_refused(settings: CollectSettings) -> None:
    path = Path(settings.model) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("w2.weight"))
    tensors[name].view(-1)[7] *= -1
    save_file(tensors, path, {"format": "pt"})
    assert refusal(settings).startswith("model_weights was ")


def test_another_configuration_tokenizer_or_name_of_the_model_is_refused(settings: CollectSettings) -> None:
    config, tokenizer = (Path(settings.model) / name for name in ("config.json", "tokenizer.json"))
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"rms_norm_eps": 1e-3}))
    assert refusal(settings).startswith("model_config was ")
    config.write_text(original)
    original = tokenizer.read_text()
    changed = json.loads(original)
    changed["decoder"] = None  # the same ids, but other strings
    tokenizer.write_text(json.dumps(changed))
    assert refusal(settings).startswith("tokenizer was ")
    tokenizer.write_text(original)
    renamed = Path(settings.model).rename(Path(settings.model).with_name("other"))
    assert refusal(replace(settings, model=str(renamed))) == "model was 'tiny-mixtral', is 'other'"


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_version_of_a_library_that_computes_is_refused(settings: CollectSettings, library: str) -> None:
    pretend(settings, **{library: "0.9"})
    assert refusal(settings).startswith(f"{library} was '0.9', is ")


def test_another_kind_of_device_is_refused_where_auto_chose_it_too(settings: CollectSettings) -> None:
    pretend(settings, device="cuda")
    assert refusal(replace(settings, device="cpu")) == "device was 'cuda', is 'cpu'"
    if not torch.cuda.is_available():
        assert refusal(replace(settings, device="auto")) == "device was 'cuda', is 'cpu'"


def test_a_run_cut_by_another_version_of_the_program_is_refused(settings: CollectSettings) -> None:
    pretend(settings)
    with pytest.raises(ConfigurationError, match="cut into other shards and batches, by another version"):
        collect(settings)


@pytest.mark.parametrize(
    "decided",
    [
        {"attn_implementation": "eager"},
        {"experts_implementation": "eager"},
        {"dtype": "bfloat16"},
        {"device": "cpu"},
        {"quantization": "int8"},
    ],
)
def test_what_is_left_to_the_program_stays_as_the_run_began(
    settings: CollectSettings, tmp_path: Path, decided: dict[str, Any]
) -> None:
    """Left to itself on this machine the program would decide otherwise, but for the device."""
    auto = {"device": "auto", "quantization": "auto"}
    began = replace(settings, **auto | decided, output_dir=tmp_path / "began")
    run_dir = collect(began).run_dir
    plan, manifest = Plan.load(run_dir), run_dir / MANIFEST_NAME
    assert decided.items() <= plan.settings.items()
    before = content(run_dir)
    manifest.write_bytes(b"")
    shard = run_dir / "data" / plan.shards[0].name
    made = shard.stat().st_mtime_ns
    collect(replace(settings, **auto, output_dir=run_dir))
    assert shard.stat().st_mtime_ns > made
    assert content(run_dir) == before
    assert verify(run_dir) == []
    if "quantization" in decided:
        pretend(began, bitsandbytes="0.1")
        assert refusal(replace(settings, **auto, output_dir=run_dir)).startswith("bitsandbytes was '0.1', is ")


def test_what_does_not_change_the_output_may_change(settings: CollectSettings, tmp_path: Path) -> None:
    """The folders of the run, the model and the texts, and options that name what was decided anyway."""
    assert settings.output_dir is not None
    before = content(settings.output_dir)
    moved = settings.output_dir.rename(tmp_path / "moved")
    (moved / MANIFEST_NAME).unlink()
    elsewhere = shutil.copytree(settings.model, tmp_path / "elsewhere" / "tiny-mixtral")
    texts = [Path(each).rename(elsewhere / Path(each).name) for each in settings.datasets.split(",")]
    named = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm", "dtype": "float32"}
    datasets = ",".join(map(str, texts))
    collect(replace(settings, model=str(elsewhere), datasets=datasets, output_dir=moved, device="auto", **named))
    assert content(moved) == before
