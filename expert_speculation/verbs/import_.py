"""`import`: other tools' routing records -> shards."""

from pathlib import Path
from typing import Any

import click

from expert_speculation.options import PATH, json_option, print_facts, write_results

FORMATS = ("requests", "sglang", "vllm", "flame", "records")
SHOWN_PLACES = 3  # of each reason; --json has more


@click.command("import")
@click.argument("paths", type=PATH, nargs=-1, required=True)
@click.option(
    "--format",
    "record_format",
    type=click.Choice(FORMATS),
    required=True,
    help="What the files are; docs/INTERCHANGE.md describes each format.",
)
@click.option("--num_experts", type=int, required=True, help="Experts per layer (E).")
@click.option("--model_name", required=True, help="Name of the traced model.")
@click.option("--output_dir", type=PATH, required=True, help="Run folder to write.")
@click.option("--num_layers", type=int, help="Layers that the source records per token, dense ones included.")
@click.option("--top_k", type=int, help="Experts per token (K); needed where the source has no shape.")
@click.option("--moe_layers", help="The model's numbers of the MoE layers, e.g. 1-26 or 1,3,5; the others are dense.")
@click.option(
    "--phase",
    type=click.Choice(["prefill", "decode"]),
    default="prefill",
    help="What the tokens were, where the source does not say.",
)
@click.option("--dataset", help="Name of the data set where the source does not say; the file's name when not given.")
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="NAME=KEY",
    help="records: read NAME from KEY. sequence, key, layer, token, experts, weights, token_id, text, dataset, phase.",
)
@click.option("--sequence_length", type=int, help="flame: tokens per sequence; FLAME-MoE was trained on 2048.")
@click.option("--model_revision", help="Revision of the traced model, where known.")
@click.option("--quantization", default="unknown", help="Precision of the experts when traced: none, nf4, int8, ...")
@click.option("--model_dtype", default="unknown", help="Data type of the traced model, e.g. bfloat16.")
@click.option("--router_dtype", default="unknown", help="Data type of its routers.")
@click.option("--shard_size_mb", type=float, default=256.0, help="Size of a shard, about; it holds whole sequences.")
@click.option("--resume", is_flag=True, help="Continue an interrupted import.")
@json_option
def import_(
    paths: tuple[Path, ...],
    record_format: str,
    moe_layers: str | None,
    fields: tuple[str, ...],
    json_file: Path | None,
    **options: Any,
) -> None:
    """Turn other tools' routing records into a trace folder.

    Only what is provably complete is kept; the rest is counted and named by reason, and the exit code is 3.
    """
    from groundwork.errors import IncompleteError
    from traces.interchange.importing import import_traces
    from traces.interchange.settings import ImportSettings, parse_layers

    layers = None if moe_layers is None else parse_layers(moe_layers)
    settings = ImportSettings(format=record_format, moe_layers=layers, fields=_mapping(fields), **options)
    result = import_traces(paths, settings)
    write_results(json_file, result.facts())
    for reason, found in result.dropped.facts().items():
        click.echo(f"left out, {reason}: {found['count']}")
        for place in found["places"][:SHOWN_PLACES]:
            click.echo(f"  {place}")
        if found["count"] > SHOWN_PLACES:
            click.echo(f"  and {found['count'] - SHOWN_PLACES} more")
    run_dir = result.run_dir
    if result.spec is None:
        why = f"no record can be used ({result.dropped})" if result.dropped.total else "the files hold no record"
        raise IncompleteError(f"{run_dir}: nothing was written, for {why}")
    spec = result.spec
    facts = {"run": str(run_dir), "sequences": result.sequences, "tokens": result.tokens, "shards": result.shards}
    print_facts(facts | {"layers, experts, per token": [spec.num_layers, spec.num_experts, spec.top_k]})
    if result.dropped.total:
        raise IncompleteError(
            f"{run_dir}: holds all that is complete, {result.dropped.total} records are left out ({result.dropped})"
        )


def _mapping(fields: tuple[str, ...]) -> dict[str, str]:
    """Return `--field NAME=KEY` as a mapping."""
    for each in fields:
        if "=" not in each:
            raise click.BadParameter(f"'{each}' is not NAME=KEY", param_hint="--field")
    return {name: key for name, _, key in (each.partition("=") for each in fields)}
