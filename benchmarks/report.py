"""How long does the report of a million tokens take, how much memory, how large is it, and how soon does it open?

    .venv/bin/python benchmarks/report.py [--tokens 1000000] [--shape 24x32x4 --shape 48x128x8] [--cores 2]

For each shape (MoE layers x experts x experts per token) writes synthetic routing (eight data sets that lean to
different experts, choices that linger from token to token, words drawn by Zipf's law) with weights as shards, and
reports on it, with the guesses of `--predictors` predictors in its journeys, in a child process that has `--cores`
cores. The time is that of opening the folder, counting, drawing and writing the file; peak memory is the child's
resident one. Where playwright and Debian's chromium are there, the page is opened in a window of 1400 x 1000 px, three
times, and the median time until its journeys and the figures in the window are drawn is printed. Exits 1 where a report
takes longer than `--seconds`, or a file is larger than `--megabytes`. The default shapes are those of gpt-oss-20b and
Qwen3-30B-A3B.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from groundwork.progress import log
from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter, lock_run

DATASETS = tuple(f"data set {letter}" for letter in "abcdefgh")
DIFFERENT = 256  # sequences drawn once and repeated under other ids and data sets' names
SHARD_SEQUENCES = 512
SHAPES = ("24x32x4", "48x128x8")
PREDICTORS = ("markov", "repeat")
FITTED_TOKENS = 20_000
MEAN_LENGTH = 250
LINGER = 0.6  # of a token's scores that it has from the token before it
WORDS = (
    *("<s>", " the", " of", " and", " to", ".", ",", "\n", " 1", "2", " (", ")", " =", "{", "s", "ing", " The", "中"),
    *(f" {a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"),
)


def make_spec(layers: int, experts: int, top_k: int) -> TraceSpec:
    """A model of the given shape, by default that of gpt-oss-20b."""
    return TraceSpec(
        model_name="random-routing", model_revision=None, num_layers=layers, num_experts=experts, top_k=top_k,
        moe_layers=tuple(range(layers)), expert_order="weight", weights_normalized=True, quantization="none",
        model_dtype="float32", router_dtype="float32", attn_implementation=None, experts_implementation=None,
        library_versions={}, tokenizer_hash=None, seed=0, plan_fingerprint="made up", store=("weights",),
    )  # fmt: skip


def draw_sequence(
    spec: TraceSpec, lean_DLE: NDArray[np.float32], number: int, generator: np.random.Generator
) -> SequenceTrace:
    """A sequence whose scores drift from token to token around what its data set leans to."""
    tokens = int(generator.integers(MEAN_LENGTH // 2, 3 * MEAN_LENGTH // 2))
    scores_TLE = generator.normal(size=(tokens, spec.num_layers, spec.num_experts)).astype(np.float32)
    for token in range(1, tokens):
        scores_TLE[token] = LINGER * scores_TLE[token - 1] + np.sqrt(1 - LINGER**2) * scores_TLE[token]
    scores_TLE += lean_DLE[number % len(DATASETS)]
    ids_TLK = np.argsort(-scores_TLE, axis=-1)[..., : spec.top_k]
    weights_TLK = np.exp(np.take_along_axis(scores_TLE, ids_TLK, -1))
    words_T = np.minimum(generator.zipf(1.3, tokens), len(WORDS)) - 1
    return SequenceTrace(
        dataset=DATASETS[number % len(DATASETS)],
        sequence_id=number,
        sequence_key=str(number),
        token_ids_T=words_T.astype(np.int32),
        tokens_T=[WORDS[word] for word in words_T],
        phase_T=np.zeros(tokens, np.uint8),
        expert_ids_TLK=ids_TLK.astype(spec.id_dtype),
        routing_weights_TLK=(weights_TLK / weights_TLK.sum(-1, keepdims=True)).astype(np.float16),
    )


def write_folder(run_dir: Path, spec: TraceSpec, tokens: int) -> int:
    """Write at least so many tokens as shards; returns how many."""
    generator = np.random.default_rng(0)
    lean_DLE = generator.normal(scale=0.5, size=(len(DATASETS), spec.num_layers, spec.num_experts)).astype(np.float32)
    drawn = [draw_sequence(spec, lean_DLE, number, generator) for number in range(DIFFERENT)]
    lengths = [each.num_tokens for each in drawn]
    count, written = 0, 0
    while written < tokens:
        written += lengths[count % DIFFERENT]
        count += 1
    with lock_run(run_dir):
        for index, first in enumerate(range(0, count, SHARD_SEQUENCES)):
            stop = min(first + SHARD_SEQUENCES, count)
            planned = PlannedShard(index, first, stop, sum(lengths[n % DIFFERENT] for n in range(first, stop)))
            with ShardWriter(run_dir, spec, planned) as writer:
                for number in range(first, stop):
                    values = vars(drawn[number % DIFFERENT]) | {"sequence_id": number, "sequence_key": str(number)}
                    writer.write(SequenceTrace(**values))
                writer.commit()
    return written


def report_child(run_dir: Path, output: Path, fit_dir: Path, predictors: int) -> dict[str, float]:
    """Write the report in this process; returns seconds, processor seconds and peak resident bytes."""
    from analysis.report import write_report
    from speculation.predictor import create

    fitted = {name: create(name).fit(TraceDataset(fit_dir)) for name in PREDICTORS[:predictors]}
    started, processor = time.monotonic(), time.process_time()
    write_report(run_dir, fitted, output)
    seconds, processor = time.monotonic() - started, time.process_time() - processor
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, which a child inherits from its parent
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    return {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak}


def seconds_to_open(page_file: Path) -> float | None:
    """Return the median time until the page is ready in chromium; None where that or playwright is missing."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            started = time.monotonic()
            page.goto(page_file.as_uri())
            page.locator("html[data-ready]").wait_for(state="attached")
            times.append(time.monotonic() - started)
            page.close()
        browser.close()
    return statistics.median(times)


@click.command()
@click.option("--tokens", default=1_000_000, show_default=True)
@click.option("--shape", "shapes", default=SHAPES, multiple=True, show_default=True, help="Layers x experts x top k.")
@click.option("--predictors", type=click.IntRange(0, len(PREDICTORS)), default=len(PREDICTORS), show_default=True)
@click.option("--cores", default=2, show_default=True, help="Processor cores that the report may use.")
@click.option("--seconds", default=120.0, show_default=True, help="Allowed for a report.")
@click.option("--megabytes", default=8.0, show_default=True, help="Allowed for the file.")
@click.option("--output", type=click.Path(path_type=Path), help="Keep the reports in this folder.")
@click.option("--child", hidden=True)
def main(
    tokens: int, shapes: tuple[str, ...], predictors: int, cores: int, seconds: float, megabytes: float,
    output: Path | None, child: str | None,
) -> None:  # fmt: skip
    """Write synthetic traces, report on them, and open the reports."""
    if child is not None:
        run_dir, page_file, fit_dir = map(Path, json.loads(child))
        click.echo(json.dumps(report_child(run_dir, page_file, fit_dir, predictors)))
        return
    excess = []
    click.echo("| tokens | layers | experts | predictors | seconds | processor s | peak MiB | file, MB | opens in, s |")
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        layers, experts, top_k = map(int, shape.split("x"))
        with tempfile.TemporaryDirectory() as temporary:
            taken = measure(Path(temporary), make_spec(layers, experts, top_k), tokens, predictors, cores, output)
        opened = taken["opened"]
        click.echo(
            f"| {int(taken['tokens']):,} | {layers} | {top_k} of {experts} | {predictors} | {taken['seconds']:.1f} | "
            f"{taken['processor_seconds']:.1f} | {taken['peak_bytes'] / 2**20:.0f} | {taken['megabytes']:.2f} | "
            f"{'no browser' if opened is None else f'{opened:.2f}'} |"
        )
        if taken["seconds"] > seconds:
            excess.append(f"{shape}: {taken['seconds']:.0f} s, allowed {seconds:g}")
        if taken["megabytes"] > megabytes:
            excess.append(f"{shape}: {taken['megabytes']:.2f} MB, allowed {megabytes:g}")
    if excess:
        raise click.ClickException("; ".join(excess))


def measure(
    folder: Path, spec: TraceSpec, tokens: int, predictors: int, cores: int, output: Path | None
) -> dict[str, Any]:
    """Report on a run of that shape in a child process; returns what it took."""
    name = f"report_{spec.num_layers}x{spec.num_experts}x{spec.top_k}.html"
    run_dir, fit_dir, page_file = folder / "run", folder / "fit", ((output or folder) / name).resolve()
    log(f"writing {tokens:,} tokens of {spec.num_layers} layers, {spec.top_k} of {spec.num_experts} experts")
    written = write_folder(run_dir, spec, tokens)
    write_folder(fit_dir, spec, min(tokens, FITTED_TOKENS))
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    paths = json.dumps([str(run_dir), str(page_file), str(fit_dir)])
    finished = subprocess.run(
        [sys.executable, __file__, "--predictors", str(predictors), "--child", paths],
        env=os.environ | {"OMP_NUM_THREADS": str(cores), "OPENBLAS_NUM_THREADS": str(cores)},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        stdout=subprocess.PIPE,
        check=True,
    )
    megabytes, opened = page_file.stat().st_size / 1e6, seconds_to_open(page_file)
    return json.loads(finished.stdout) | {"tokens": written, "megabytes": megabytes, "opened": opened}


if __name__ == "__main__":
    main()
