"""What does streaming layers gain over accelerate's disk offload, where the weights exceed the memory?

    .venv/bin/python benchmarks/streamed_execution.py [--gigabytes 2] [--cap_gb 1] [--batches 8] [--batch_tokens 256]
        [--folder /tmp]

writes a random Mixtral of that many bfloat16 gigabytes, a file for each layer, and takes the same random batches
through it on the CPU, each way in a process of its own: layer by layer, and batch by batch with
`from_pretrained(device_map="auto", max_memory={"cpu": ...}, offload_folder=...)`, which reads the offloaded layers for
every batch. (Its CPU offload needs a GPU: benchmarks/streamed_gpu.py.) Every batch's experts are compared.

The cap is on a process's own pages (RssAnon) beyond those it had before it opened the model: a thread looks every 5 ms
and ends the process above it. Limits that need no root can not be used: RLIMIT_AS and RLIMIT_DATA count a file that is
mapped, of which nothing needs to be in memory. Nor may the page cache stand in for memory: it is dropped for both
before they start, before the pass of the streamed one and before each batch of the other, mapped pages too. Bytes read
are those that the disk delivered (read_bytes of /proc/self/io).
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from loading_memory import VOCABULARY, status, write_checkpoint

from moe.description import sketch_model
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import RouterLayout
from moe.source import find_source
from moe.streaming.captured import unpack
from moe.streaming.load import open_layered
from moe.streaming.tracer import StreamedTracer

Around = Callable[[], AbstractContextManager[Any]]
LENGTH = 64  # tokens of a sequence
SHARE_OF_CAP = 0.9  # that accelerate may plan with
OVER_CAP = 70  # exit code
_MADV_DONTNEED = 4  # Linux, asm-generic/mman-common.h


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True)
@click.option("--cap_gb", default=1.0, show_default=True)
@click.option("--batches", default=8, show_default=True)
@click.option("--batch_tokens", default=256, show_default=True)
@click.option("--folder", default=None, help="On the disk to measure.")
@click.option("--child", nargs=2, hidden=True)
def main(
    gigabytes: float, cap_gb: float, batches: int, batch_tokens: int, folder: str | None, child: tuple[str, str] | None
) -> None:
    """Print the table."""
    if child:
        mode, model = child
        drawn = random_batches(batches, batch_tokens)
        with Capped(cap_gb * 1e9) as capped:
            if mode == "streamed":
                facts = streamed(Path(model), drawn)
            else:
                facts = offloaded(Path(model), drawn, {"cpu": int(SHARE_OF_CAP * cap_gb * 1e9)})
        print(json.dumps(facts | {"own": capped.peak}))
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = Path(place) / "model"
        model.mkdir()
        write_checkpoint(model, gigabytes)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(
            f"random Mixtral of {size / 1e9:.2f} GB in bfloat16; {batches} batches of {batch_tokens} tokens; at most "
            f"{cap_gb:g} GB of own pages; torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        )
        options = ["--cap_gb", cap_gb, "--batches", batches, "--batch_tokens", batch_tokens]
        found = {mode: _in_child(mode, model, options) for mode in ("streamed", "disk offload")}
    print("| | to start, s | read to start, GB | tracing, s | tokens/s | read, GB | own pages, GB |")
    print("|---|---|---|---|---|---|---|")
    for mode, each in found.items():
        print(
            f"| {mode} | {each['start_s']:.1f} | {each['start_read'] / 1e9:.2f} | {each['seconds']:.1f} | "
            f"{batches * batch_tokens / each['seconds']:.0f} | {each['read'] / 1e9:.2f} | {each['own'] / 1e9:.2f} |"
        )
    ours, theirs = found.values()
    print(
        f"\nstreamed: {theirs['seconds'] / ours['seconds']:.2f} times the tokens per second, offload: "
        f"{theirs['read'] / ours['read']:.2f} times the bytes and {theirs['own'] / ours['own']:.2f} times the own pages"
    )
    print(
        f"of {size / 1e9:.2f} GB the offload reads {theirs['read'] / batches / 1e9:.2f} for every batch, "
        f"{batches} times; streaming reads them once"
    )
    same = sum(one == two for one, two in zip(ours["ids"], theirs["ids"], strict=True))
    print(f"the same experts in {same} of {batches} batches")
    sys.exit(same != batches)


def streamed(
    model: Path, batches: list[torch.Tensor], device: str = "cpu", around: Around = nullcontext
) -> dict[str, Any]:
    """Take the batches through one layer after the other, `around()` being the context of what is timed."""
    begun, before = time.perf_counter(), bytes_read()
    drop_cache(model)
    _, layered = open_layered(str(model), device=device)
    with StreamedTracer(layered) as tracer:
        start_s, start_read = time.perf_counter() - begun, bytes_read() - before
        drop_cache(model)
        hidden: list[torch.Tensor | None] = [None] * len(batches)
        shown: list[list[dict[str, torch.Tensor]]] = [[] for _ in batches]
        with around():
            begun, before = time.perf_counter(), bytes_read()
            with tracer.layers() as layers:
                for index in layers:
                    for number, ids_BT in enumerate(batches):
                        hidden[number], part = tracer.run(index, ids_BT, _lengths(ids_BT), hidden[number])
                        shown[number].append(part)
            routed = [
                unpack(each, len(ids_BT), layered.layout.num_experts, 0)
                for each, ids_BT in zip(shown, batches, strict=True)
            ]
            seconds, read = time.perf_counter() - begun, bytes_read() - before
    return _facts(start_s, start_read, seconds, read, routed)


def offloaded(
    model: Path, batches: list[torch.Tensor], max_memory: dict[Any, int], around: Around = nullcontext
) -> dict[str, Any]:
    """Take batch after batch through the model, of which accelerate leaves elsewhere what does not fit."""
    from transformers import AutoModel

    with tempfile.TemporaryDirectory(dir=model.parent) as offload:
        begun, before = time.perf_counter(), bytes_read()
        drop_cache(model)
        loaded = AutoModel.from_pretrained(
            model,
            dtype="auto",
            device_map="auto",
            max_memory=max_memory,
            offload_folder=offload,
        )
        start_s, start_read = time.perf_counter() - begun, bytes_read() - before
        return trace(loaded, routers_of(loaded, model), batches, (model, Path(offload)), start_s, start_read, around)


def trace(
    loaded: Any,
    layout: RouterLayout,
    batches: list[torch.Tensor],
    forgotten: tuple[Path, ...],
    start_s: float,
    start_read: int,
    around: Around = nullcontext,
) -> dict[str, Any]:
    """Take batch after batch through a loaded model; the page cache of some folders is dropped before each."""
    seconds, read, routed = 0.0, 0, []
    with ResidentTracer(loaded, layout) as tracer:
        for ids_BT in batches:
            drop_cache(*forgotten)
            with around():
                begun, before = time.perf_counter(), bytes_read()
                routed.append(tracer.trace(ids_BT, _lengths(ids_BT)))
                seconds, read = seconds + time.perf_counter() - begun, read + bytes_read() - before
    return _facts(start_s, start_read, seconds, read, routed)


def routers_of(loaded: Any, folder: Path) -> RouterLayout:
    """Return the routers of an offloaded model, which can not be asked alone, as its sketch says."""
    _, layout = sketch_model(find_source(str(folder)), "auto")

    def placed(name: str) -> dict[str, Any]:
        block = name.rpartition(".")[0]
        parts = {"module": name, "block": block, "experts": f"{block}.experts"}
        return {part: loaded.get_submodule(each) for part, each in parts.items()}

    return replace(layout, sites=tuple(replace(site, **placed(site.name)) for site in layout.sites))


class Capped:
    """A context that ends the process with code 70 as soon as its own pages grow by more than `cap` bytes."""

    def __init__(self, cap: float) -> None:
        self.peak = 0
        self._cap, self._before = cap, status("RssAnon")
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Capped":
        self._watcher.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, status("RssAnon") - self._before)
            if self.peak > self._cap:
                os.write(2, f"{self.peak / 1e9:.2f} GB of own pages exceed the cap\n".encode())
                os._exit(OVER_CAP)


def drop_cache(*folders: Path) -> None:
    """Have the kernel forget the pages of all files there, also of those that this process has mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if any(line.endswith(".safetensors") and f" {folder}/" in line for folder in folders):
            first, stop = (int(each, 16) for each in line.split()[0].split("-"))
            libc.madvise(first, stop - first, _MADV_DONTNEED)  # nothing writes to weights, so nothing is lost
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def bytes_read() -> int:
    """Return what the disk has delivered to this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def random_batches(count: int, tokens: int, length: int = LENGTH, vocabulary: int = VOCABULARY) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocabulary, (tokens // length, length), generator=generator) for _ in range(count)]


def _lengths(ids_BT: torch.Tensor) -> torch.Tensor:
    return torch.full((len(ids_BT),), ids_BT.shape[1])


def _facts(start_s: float, start_read: int, seconds: float, read: int, routed: list[BatchRouting]) -> dict[str, Any]:
    ids = [hash(tuple(each.expert_ids_BTLK.flatten().tolist())) for each in routed]
    return {"start_s": start_s, "start_read": start_read, "seconds": seconds, "read": read, "ids": ids}


def _in_child(mode: str, model: Path, options: list[Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, options), "--child", mode, str(model)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{mode}: exit code {ended.returncode}: {ended.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
