"""How much memory does reading take when the folder is twenty times as large? Writes such a folder and reads it.

    .venv/bin/python benchmarks/reader_memory.py [--memory_mb 512] [--times 20] [--workers 2]

The shards hold weights, logits and lookahead logits of Mixtral-8x7B's shape (32 layers, 2 of 8) in row groups of 64 MiB
decoded, at least `--times` times `--memory_mb` on disk. Child processes read all of it with every column, once in
stored order, once shuffled, and once shuffled by several workers; printed are peak resident memory and sequences found,
and it exits 1 where a peak exceeds `--memory_mb`. The folder is deleted afterwards.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from groundwork.progress import log, progress
from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter, lock_run

LENGTH = 250
DIFFERENT = 128  # sequences drawn once and repeated under other ids: drawing 10 GB would take longer than reading it
SHARD_SEQUENCES = 2048


def make_spec() -> TraceSpec:
    """Mixtral-8x7B's shape with every column."""
    return TraceSpec(
        model_name="random-routing",
        num_layers=32,
        num_experts=8,
        top_k=2,
        moe_layers=tuple(range(32)),
        expert_order="weight",
        weights_normalized=True,
        quantization="none",
        model_dtype="float32",
        router_dtype="float32",
        plan_fingerprint="made up",
        store=("weights", "logits", "lookahead"),
        horizons=1,
    )


def draw_sequence(spec: TraceSpec, sequence_id: int, generator: np.random.Generator) -> SequenceTrace:
    """A sequence of random logits and what a router of top 2 would make of them."""
    logits_TLE = generator.normal(size=(LENGTH, spec.num_layers, spec.num_experts)).astype(np.float16)
    ids_TLK = np.argsort(-logits_TLE, axis=-1, kind="stable")[..., : spec.top_k]
    weights_TLK = np.exp(np.take_along_axis(logits_TLE, ids_TLK, -1).astype(np.float32))
    lookahead_THLE = logits_TLE[:, None].copy()
    lookahead_THLE[:, 0, 0] = 0
    return SequenceTrace(
        dataset=f"random {sequence_id % 8}",
        sequence_id=sequence_id,
        sequence_key=str(sequence_id),
        token_ids_T=generator.integers(0, 32000, LENGTH).astype(np.int32),
        tokens_T=["token"] * LENGTH,
        phase_T=np.zeros(LENGTH, np.uint8),
        expert_ids_TLK=ids_TLK.astype(spec.id_dtype),
        routing_weights_TLK=(weights_TLK / weights_TLK.sum(-1, keepdims=True)).astype(np.float16),
        router_logits_TLE=logits_TLE,
        lookahead_logits_THLE=lookahead_THLE,
    )


def write_folder(run_dir: Path, least_bytes: int) -> int:
    """Write shards until the folder is large enough; returns its size in bytes."""
    spec = make_spec()
    generator = np.random.default_rng(0)
    drawn = [draw_sequence(spec, number, generator) for number in range(DIFFERENT)]
    size = index = 0
    with lock_run(run_dir), progress(total=least_bytes // 10**6, description="writing", unit="MB") as bar:
        while size < least_bytes:
            first = index * SHARD_SEQUENCES
            planned = PlannedShard(index, first, first + SHARD_SEQUENCES, SHARD_SEQUENCES * LENGTH)
            with ShardWriter(run_dir, spec, planned) as writer:
                for sequence_id in range(first, first + SHARD_SEQUENCES):
                    values = vars(drawn[sequence_id % DIFFERENT]) | {"sequence_id": sequence_id}
                    writer.write(SequenceTrace(**values | {"sequence_key": str(sequence_id)}))
                written = writer.commit().bytes
            size, index = size + written, index + 1
            bar.update(written // 10**6)
    return size


def read_folder(run_dir: Path, shuffle_seed: int | None, worker: tuple[int, int]) -> dict[str, int]:
    """Read everything; returns what was found and the peak resident memory."""
    columns = ("weights", "logits", "lookahead", "tokens")
    stream = TraceDataset(run_dir).sequences("all", columns, shuffle_seed=shuffle_seed, worker=worker)
    tokens = check = 0
    for trace in stream:
        tokens += trace.num_tokens
        check ^= hash((trace.sequence_id, int(trace.expert_ids_TLK.sum())))
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, which a child inherits from its parent
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    return {"sequences": stream.position, "tokens": tokens, "check": check, "peak_bytes": peak}


def run_children(run_dir: Path, seed: int | None, workers: int) -> list[dict[str, int]]:
    """Read the folder with so many processes at once; raises CalledProcessError where one fails."""
    arguments = [json.dumps([str(run_dir), seed, [number, workers]]) for number in range(workers)]
    children = [
        subprocess.Popen([sys.executable, __file__, "--child", each], stdout=subprocess.PIPE) for each in arguments
    ]
    results = []
    for child in children:
        output, _ = child.communicate()
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, child.args)
        results.append(json.loads(output))
    return results


@click.command()
@click.option("--memory_mb", type=int, default=512, show_default=True, help="Allowed per reading process, MiB.")
@click.option("--times", type=float, default=20.0, show_default=True, help="Folder size over allowed memory.")
@click.option("--workers", type=int, default=2, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; a temporary folder when not given.")
@click.option("--child", hidden=True)
def main(memory_mb: int, times: float, workers: int, folder: Path | None, child: str | None) -> None:
    """Write a folder many times as large as the memory that its readers may use, and read it."""
    if child is not None:
        run_dir, seed, worker = json.loads(child)
        click.echo(json.dumps(read_folder(Path(run_dir), seed, tuple(worker))))
        return
    memory_bytes = memory_mb * 2**20
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        size = write_folder(Path(temporary) / "run", int(times * memory_bytes))
        click.echo(f"{size / 2**30:.2f} GiB on disk, {size / memory_bytes:.1f} times the {memory_mb} MiB allowed")
        click.echo(
            "| order | processes | sequences | tokens | peak MiB per process | tokens/s |\n|---|---|---|---|---|---|"
        )
        checks = set()
        for name, seed, processes in (("stored", None, 1), ("shuffled", 0, 1), ("shuffled", 0, workers)):
            log(f"reading {name} with {processes} processes")
            started = time.monotonic()
            results = run_children(Path(temporary) / "run", seed, processes)
            seconds = time.monotonic() - started
            tokens = sum(each["tokens"] for each in results)
            check = 0
            for each in results:
                check ^= each["check"]
            checks.add((sum(each["sequences"] for each in results), tokens, check))
            peak = max(each["peak_bytes"] for each in results) / 2**20
            sequences = sum(each["sequences"] for each in results)
            click.echo(f"| {name} | {processes} | {sequences} | {tokens:,} | {peak:.0f} | {tokens / seconds:,.0f} |")
            if peak > memory_mb:
                raise click.ClickException(f"{peak:.0f} MiB are more than the {memory_mb} allowed")
        if len(checks) != 1:
            raise click.ClickException("the readings differ")
        click.echo("all readings found the same sequences, each once")


if __name__ == "__main__":
    main()
