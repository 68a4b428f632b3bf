"""Which GPUs a run gets, and which of them hold the model together where one can not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from collection.collector import dry_run
from collection.devices import join_devices, split_devices
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from moe.foresight import TooLargeError, foresee_loading

Make = Callable[..., CollectSettings]
Gpus = Callable[..., None]


@pytest.fixture
def needed(model_dir: Path) -> int:
    """The bytes that the model takes."""
    return foresee_loading(str(model_dir), device="cpu").needed


@pytest.fixture
def texts(tmp_path: Path, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]) -> str:
    return str(write_texts(tmp_path / "texts.jsonl", make_texts(20, longest=30)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("all", "--device all: stands for all GPUs, and this machine has none; use cpu or auto"),
        ("cpu,gpu", "--device cpu,gpu: 'gpu' is not a device of this machine; use 'auto' or one of cpu"),
        ("cpu,cuda:0+cuda:1", "--device cpu,cuda:0.cuda:1: 'cuda:0' is not a device of this machine"),
        ("cpu,", "--device cpu,: a comma without a device beside it"),
        ("all,cpu", "--device all,cpu: 'all' stands for all GPUs of this machine, which has 0, and for nothing"),
    ],
)
def test_devices_that_are_not_there_are_refused(names: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        split_devices(names)


def test_gpus_are_named_once_and_not_beside_processors(gpus: Callable[..., None]) -> None:
    gpus(1, 1, 1)
    assert split_devices("cuda:2+cuda:0, cuda:1") == ["cuda:2+cuda:0", "cuda:1"]
    gpus(1, 1)
    assert split_devices("all") == split_devices("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(ConfigurationError, match=r"^--device cuda,cuda:0: names cuda:0 twice"):
        split_devices("cuda,cuda:0")
    with pytest.raises(ConfigurationError, match="names cuda:0 twice"):
        split_devices("cuda:0+cuda:1,cuda:0")
    with pytest.raises(ConfigurationError, match="differ between kinds of device"):
        split_devices("cuda:0,cpu")


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (2, 1.2, ["cuda:0", "cuda:1"]),
        (4, 0.75, ["cuda:0+cuda:1", "cuda:2+cuda:3"]),
        (3, 0.75, ["cuda:0+cuda:1+cuda:2"]),
        (5, 0.75, ["cuda:0+cuda:1+cuda:2", "cuda:3+cuda:4"]),
    ],
)
def test_as_few_gpus_are_joined_as_hold_the_model(
    make_settings: Make, gpus: Gpus, needed: int, count: int, share: float, expected: list[str]
) -> None:
    gpus(*[int(share * needed)] * count)
    for execution in ("auto", "resident"):
        assert join_devices(make_settings(execution=execution), split_devices("all")) == expected


def test_workers_are_not_counted_without_ray(make_settings: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"^--workers 2: counts those of --engine ray"):
        make_settings(workers=2)


def test_a_smaller_gpu_joins_where_it_can_not_hold_the_model_alone(
    make_settings: Make, gpus: Gpus, needed: int
) -> None:
    gpus(2 * needed, needed // 2)
    assert join_devices(make_settings(), split_devices("all")) == ["cuda:0+cuda:1"]


def test_what_is_streamed_or_not_held_by_all_together_is_not_joined(
    make_settings: Make, gpus: Gpus, needed: int
) -> None:
    gpus(needed // 2, needed // 2)
    separate = split_devices("all")
    assert join_devices(make_settings(execution="auto"), separate) == separate
    gpus(needed, needed)
    assert join_devices(make_settings(execution="streamed"), separate) == separate
    assert join_devices(make_settings(engine="ray"), separate) == separate


def test_a_dry_run_says_which_gpus_hold_the_model_and_what_it_takes(
    make_settings: Make, gpus: Gpus, needed: int, texts: str, capfd: pytest.CaptureFixture[str]
) -> None:
    gpus(*[needed * 3 // 4] * 2)
    plan = dry_run(make_settings(datasets=texts, device="all", execution="auto"))
    assert (plan["devices"], plan["execution"]) == (["cuda:0+cuda:1"], "resident")
    assert plan["device"].startswith("Card 0 (")
    assert " + Card 1 (" in plan["device"]
    assert plan["memory_bytes"] == {"needed": needed, "free": 2 * (needed * 3 // 4)}
    assert "one GPU can not hold the model, so it is spread: cuda:0+cuda:1" in capfd.readouterr().err
    assert dry_run(make_settings(datasets=texts, device="cuda:1+cuda:0"))["devices"] == ["cuda:1+cuda:0"]
    gpus(*[needed // 2] * 2)
    with pytest.raises(TooLargeError, match="cuda:0 and cuda:1 together have"):
        dry_run(make_settings(datasets=texts, device="all", execution="resident"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution": "streamed"}, "holds a layer or two of the model, for which one device will do"),
        ({"batch_size": "auto", "batch_tokens": None}, "--batch_size auto: probes one device"),
        ({"engine": "ray"}, "Ray gives each worker its device"),
    ],
)
def test_what_joined_gpus_can_not_do_is_refused(
    make_settings: Make, gpus: Gpus, changes: dict[str, object], message: str
) -> None:
    gpus(2**40, 2**40)
    with pytest.raises(ConfigurationError, match=message):
        dry_run(make_settings(device="cuda:0+cuda:1", **changes))
