"""`simulate`: what prefetching buys."""

from pathlib import Path
from typing import Any

import click

from expert_speculation.options import (
    PATH,
    json_option,
    predictor_dirs_option,
    seed_option,
    shard_dir_option,
    write_results,
)


@click.command()
@shard_dir_option
@predictor_dirs_option
@click.option(
    "--hardware",
    default="rtx-3090",
    help="Machine: rtx-3090, rtx-4090, rtx-a6000, a100-40gb, a100-80gb, h100, laptop, a .toml file, or measure, which "
    "measures this one (docs/HARDWARE.md).",
)
@click.option("--model_profile", help="Sizes of the model: a name or a .toml file; by the traces when not given.")
@click.option("--precision", help="Of the experts, such as bf16, int8, nf4, mxfp4; as published when not given.")
@click.option(
    "--cache_experts",
    help="Experts that the GPU holds, over all layers, a share of them such as 25%, or memory such as 12GB; what fits "
    "when not given.",
)
@click.option("--ram_experts", help="Experts that RAM holds, likewise; the rest are read from the disk.")
@click.option(
    "--cache_layout",
    default="pooled",
    help="Whether layers share the cache (pooled) or have equal parts of it (per_layer).",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Eviction: lru, lfu, lfu_aged, static, guided (by a predictor), belady (knows the future); repeat for "
    "several. When not given, all without prefetching, and the best of them, guided and belady with it.",
)
@click.option("--horizon", type=int, default=1, help="Layers ahead that predictors are asked about.")
@click.option("--budget", type=int, help="Experts that a prediction may fetch, for each sequence; K when not given.")
@click.option("--threshold", type=float, default=0.5, help="Least probability of what is prefetched.")
@click.option("--batch_size", type=int, default=1, help="Sequences decoded at once.")
@click.option(
    "--prediction_us",
    help="What a prediction costs: microseconds, or measure; when not given, as documented, else measured.",
)
@click.option("--split", default="test", help="train, validation, test or all.")
@click.option("--only_dataset", multiple=True, help="Simulate just the sequences of this data set; repeat for several.")
@click.option(
    "--sweep_tokens",
    type=int,
    default=4096,
    help="Tokens on which cache sizes, links and break-even accuracy are tried; 0 leaves that out.",
)
@click.option("--bootstrap", type=int, default=1000, help="Resamples of the sequences that intervals are from.")
@click.option(
    "--figure",
    "figure_file",
    type=PATH,
    help="Also draw it: an .html page, or .svg, .png, .pdf, which need the extra `figures` and Chromium or Chrome.",
)
@seed_option
@json_option
def simulate(
    shard_dir: Path,
    predictor_dirs: tuple[Path, ...],
    hardware: str,
    model_profile: str | None,
    only_dataset: tuple[str, ...],
    figure_file: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Simulate decoding with prefetched experts: tokens per second, waiting and bytes, and whether it is worth it.

    Compared are no prefetching, better eviction alone, each predictor, perfect predictions as far ahead, and an oracle
    that knows a whole token. How it is simulated, and what it leaves out, is in docs/SIMULATION.md.
    """
    from analysis.simulation_page import check_figure, write_figure
    from groundwork.profiles.loading import hardware_profile, model_profile_for
    from groundwork.profiles.loading import model_profile as named_model_profile
    from groundwork.profiles.measure import measure_hardware
    from prefetch.settings import SimulateSettings
    from prefetch.simulate import format_result
    from prefetch.simulate import simulate as run
    from speculation.predictor import load_predictors
    from traces.reader import TraceDataset

    settings = SimulateSettings(**options)
    if figure_file is not None:
        check_figure(figure_file, swept=settings.sweep_tokens > 0)
    dataset = TraceDataset(shard_dir)
    model = model_profile_for(dataset.spec.model_name) if model_profile is None else named_model_profile(model_profile)
    predictors = load_predictors(predictor_dirs)
    machine = measure_hardware(shard_dir) if hardware == "measure" else hardware_profile(hardware)
    result = run(dataset, predictors, model, machine, settings, only_dataset)
    click.echo(format_result(result))
    write_results(json_file, result)
    if figure_file is not None:
        write_figure(result, figure_file)
        click.echo(figure_file)
