"""`import`: other tools' routing records -> shards."""

from pathlib import Path

import click

from expert_speculation.options import PATH


@click.command("import")
@click.argument("paths", type=PATH, nargs=-1, required=True)
@click.option(
    "--format",
    "record_format",
    type=click.Choice(["requests"]),
    required=True,
    help="requests: one JSON object per line with shape, tokens, routed_experts; plain or gzip.",
)
@click.option("--num_experts", type=int, required=True, help="Experts per layer (E).")
@click.option("--model_name", required=True, help="Name of the traced model.")
@click.option("--output_dir", type=PATH, required=True, help="Run folder to write.")
@click.option("--phase", type=click.Choice(["prefill", "decode"]), default="prefill", help="What the tokens were.")
@click.option("--shard_size_mb", type=float, default=256.0, help="Size of a shard, about.")
def import_(
    paths: tuple[Path, ...],
    record_format: str,
    num_experts: int,
    model_name: str,
    output_dir: Path,
    phase: str,
    shard_size_mb: float,
) -> None:
    """Turn other tools' routing records into a trace folder."""
    from traces.interchange import import_requests

    result = import_requests(paths, output_dir, num_experts, model_name, phase=phase, shard_size_mb=shard_size_mb)
    click.echo(f"{output_dir}: {result.sequences} sequences, {result.tokens} tokens")
