"""Streamed runs that each die of SIGKILL somewhere else, and are resumed: `streamed_harness.py FOLDER`.

Everything is made below FOLDER: a model of two layers, texts, `whole`, a run that nothing interrupts, and `run000`,
`run001`, ... A run dies before one of the file operations of a pass, in whichever thread: of each place in the program
that does some, at the first and the last. Each run is a fork of this process. Prints a line for each,
separated by tabs: folder, place, how the process ended (-9: SIGKILL), how many layers the pass had finished, how the
resumed process ended.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "collection")]

import torch  # noqa: E402
from conftest import _make_texts, _write_texts  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402

from collection.collector import collect  # noqa: E402
from collection.pass_state import WORKING_FOLDER  # noqa: E402
from collection.settings import CollectSettings  # noqa: E402
from moe.training.tokenizer import train_tokenizer  # noqa: E402

OPERATIONS = {"fsync", "replace", "unlink", "mkdir", "rmdir", "serialize_file"}
PLACES = ("commit", "list_shard", "save_file", "write_tensors", "write_bytes", "append_line", "_rmtree_safe_fd")
PLACES += ("rmtree", "Path.unlink")


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        initializer_range=0.3,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    train_tokenizer(_make_texts(50), 300).save_pretrained(folder)


def settings(folder: Path, name: str) -> CollectSettings:
    return CollectSettings(
        model=str(folder / "tiny"),
        device="cpu",
        datasets=str(folder / "texts.jsonl"),
        target_traces=7,
        max_length=32,
        batch_size=2,
        shard_size_mb=0.004,
        store=("weights", "logits"),
        sample_hidden=0.3,
        execution="streamed",
        pass_tokens=128,
        memory_budget_gb=0,
        output_dir=folder / name,
        resume=True,
    )


def watch(at: Callable[[str], None]) -> None:
    """Have `at` be called, in every thread, with the place of each file operation that is about to happen."""

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in OPERATIONS and begun(frame):
            place = frame.f_code.co_qualname
            if place.endswith(PLACES):
                at(f"{function.__name__} in {place}")

    def begun(frame: FrameType | None) -> bool:
        """Say whether this is a part of a pass: below ShardStreamer, or in another thread."""
        while frame and frame.f_code.co_qualname != "collect":
            if frame.f_code.co_qualname == "ShardStreamer.write_shards":
                return True
            frame = frame.f_back
        return frame is None

    sys.setprofile(profile)
    threading.setprofile(profile)


def fork(work: Callable[[], object]) -> int:
    """Do the work in a child; returns its exit code, or -n where signal n ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(70)


def finished_layers(run_dir: Path) -> int | None:
    path = run_dir / WORKING_FOLDER / "progress.json"
    return json.loads(path.read_text())["layers"] if path.exists() else None


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    make_model(folder / "tiny")
    _write_texts(folder / "texts.jsonl", _make_texts(12, longest=14))

    places: list[str] = []
    watch(places.append)
    collect(settings(folder, "whole"))  # here, so that forks need not import and make what every run needs
    sys.setprofile(None)
    threading.setprofile(None)
    where = {place: [number for number, each in enumerate(places) if each == place] for place in places}
    points = sorted({number for numbers in where.values() for number in (numbers[0], numbers[-1])})
    for count, point in enumerate(points):
        name = f"run{count:03d}"

        def die(point: int = point, name: str = name) -> None:
            left = [point]

            def strike(place: str) -> None:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

            watch(strike)
            collect(settings(folder, name))

        ended = fork(die)
        layers = finished_layers(folder / name)
        resumed = fork(lambda name=name: collect(settings(folder, name)))
        print(name, places[point], ended, layers, resumed, sep="\t", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
