"""How fast does a GPU of 24 GB trace a model of Mixtral-8x7B's shape, streamed, and with accelerate's offload?

    python benchmarks/streamed_gpu.py [--layers 32] [--gpu_gb 24] [--batches 16] [--batch_tokens 16384] [--folder /tmp]

writes a checkpoint of that many of Mixtral-8x7B's layers with random weights, made one by one on the GPU (2.9 GB each:
94 GB for all 32, and 28 GB for the copy that `pack` makes; fewer layers where the disk is smaller), and takes the same
random batches through it, each way in a process of its own:

- streamed, from bfloat16 and from packed NF4, with the GPU limited to `--gpu_gb`
  (torch.cuda.set_per_process_memory_fraction);
- accelerate's offload to the CPU's memory, and to the disk, with the same limit, of which it may plan with 0.8;
- resident in NF4, with all of the card.

Printed are tokens per second, what the disk delivered while tracing, the most memory that torch allocated, and the
share of the time in which kernels ran, from a second time through the same batches under torch's profiler. It exits 2
without a GPU, and where the disk is too small.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from loading_memory import write_checkpoint
from streamed_execution import Around, bytes_read, drop_cache, offloaded, random_batches, streamed, trace

from groundwork.hardware import describe_device, free_memory_bytes
from moe.load import load_model
from moe.packed import pack
from moe.routers import find_routers

WIDTH, INTERMEDIATE, VOCABULARY, HEAD = 4096, 14336, 32000, 128  # Mixtral-8x7B's config.json
LAYER_GB = 8 * 3 * WIDTH * INTERMEDIATE * 2 / 1e9  # of its experts, as write_checkpoint counts layers
LENGTH = 512
SHARE_PLANNED = 0.8  # by accelerate; the rest is for activations and the layer on its way
HOST_SHARE = 0.6  # of the free host memory, for CPU offload
DISK_OFFLOAD_HOST_BYTES = 4 * 10**9
MODES = ("streamed bf16", "streamed NF4", "CPU offload bf16", "disk offload bf16", "resident NF4")


@click.command()
@click.option("--layers", default=32, show_default=True)
@click.option("--gpu_gb", default=24.0, show_default=True)
@click.option("--batches", default=16, show_default=True)
@click.option("--batch_tokens", default=16384, show_default=True)
@click.option("--folder", default=None, help="On the disk to measure.")
@click.option("--child", nargs=2, hidden=True)
def main(
    layers: int, gpu_gb: float, batches: int, batch_tokens: int, folder: str | None, child: tuple[str, str] | None
) -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device here, so nothing was measured", file=sys.stderr)
        sys.exit(2)
    if child:
        mode, place = child
        if not mode.startswith("resident"):
            _, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(min(gpu_gb * 1e9 / total, 1.0))
        drawn = random_batches(batches, batch_tokens, LENGTH, VOCABULARY)
        facts = run(mode, Path(place), drawn, "cuda:0", int(gpu_gb * 1e9))
        peak = torch.cuda.max_memory_allocated()
        print(json.dumps(facts | {"peak": peak, "share": computing(mode, Path(place), drawn, int(gpu_gb * 1e9))}))
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        needed, free = layers * LAYER_GB * 1.35, shutil.disk_usage(place).free / 1e9
        if needed * 1.05 > free:
            print(f"{place}: {needed:.0f} GB are needed and {free:.0f} free; give fewer --layers", file=sys.stderr)
            sys.exit(2)
        size = write_models(Path(place), layers)
        print(
            f"{describe_device(torch.device('cuda'))}; torch {torch.__version__}; {layers} of Mixtral-8x7B's layers, "
            f"{size / 1e9:.1f} GB in bfloat16; {batches} batches of {batch_tokens} tokens; {gpu_gb:g} GB of the GPU "
            "but where resident\n"
        )
        print("| | to start, s | tracing, s | tokens/s | read, GB | peak, GB | kernels ran |")
        print("|---|---|---|---|---|---|---|")
        options = ["--gpu_gb", gpu_gb, "--batches", batches, "--batch_tokens", batch_tokens]
        for mode in MODES:
            command = [sys.executable, __file__, *map(str, options), "--child", mode, place]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                print(f"| {mode} | failed: {ended.stderr.strip().splitlines()[-1][:200]} | | | | | |", flush=True)
                continue
            each = json.loads(ended.stdout.splitlines()[-1])
            print(
                f"| {mode} | {each['start_s']:.1f} | {each['seconds']:.1f} | "
                f"{batches * batch_tokens / each['seconds']:.0f} | {each['read'] / 1e9:.1f} | "
                f"{each['peak'] / 1e9:.1f} | {each['share']:.0%} |",
                flush=True,
            )


def write_models(place: Path, layers: int, device: str = "cuda", **shape: int) -> int:
    """Write `bf16` and its packed copy `nf4`; returns the bytes of the former."""
    shape = shape or {"width": WIDTH, "intermediate": INTERMEDIATE, "vocabulary": VOCABULARY, "head": HEAD}
    (place / "bf16").mkdir()
    each = 8 * 3 * shape["width"] * shape["intermediate"] * 2 / 1e9
    write_checkpoint(place / "bf16", layers * each, device=device, **shape)
    pack(str(place / "bf16"), place / "nf4", quantization="nf4", device=device)
    return sum(path.stat().st_size for path in (place / "bf16").glob("*.safetensors"))


def run(
    mode: str, place: Path, batches: list[torch.Tensor], device: str, limit: int, around: Around = nullcontext
) -> dict[str, Any]:
    """Take the batches through the model in one of the ways."""
    model = place / ("nf4" if mode.endswith("NF4") else "bf16")
    if mode.startswith("streamed"):
        return streamed(model, batches, device, around)
    if mode.startswith("resident"):
        begun, before = time.perf_counter(), bytes_read()
        drop_cache(model)
        loaded = load_model(str(model), device=device).model
        start_s, start_read = time.perf_counter() - begun, bytes_read() - before
        return trace(loaded, find_routers(loaded), batches, (), start_s, start_read, around)
    in_memory = int(HOST_SHARE * free_memory_bytes(torch.device("cpu")))
    host = in_memory if mode.startswith("CPU") else DISK_OFFLOAD_HOST_BYTES
    return offloaded(model, batches, {0: int(SHARE_PLANNED * limit), "cpu": host}, around)


def computing(mode: str, place: Path, batches: list[torch.Tensor], limit: int) -> float:
    """Return the share of the time of tracing in which kernels other than copies ran, by torch's profiler.

    Where kernels of two streams overlap they count twice: here one computes, and the other copies and quantises.
    """
    torch.cuda.empty_cache()
    microseconds = 0.0

    @contextmanager
    def profiled() -> Iterator[None]:
        nonlocal microseconds
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield
        kernels = (each for each in profile.key_averages() if not each.key.startswith(("Memcpy", "Memset")))
        microseconds += sum(each.self_device_time_total for each in kernels)

    facts = run(mode, place, batches, "cuda:0", limit, profiled)
    return microseconds / 1e6 / float(facts["seconds"])


if __name__ == "__main__":
    main()
