"""`export`: shards -> other tools' routing records."""

import shlex
from pathlib import Path

import click

from expert_speculation.options import PATH, json_option, shard_dir_option, write_results
from expert_speculation.verbs.import_ import FORMATS

SHOWN_FILES = 3  # of the export, in the command that imports it


@click.command()
@shard_dir_option
@click.option(
    "--format",
    "record_format",
    type=click.Choice(FORMATS),
    required=True,
    help="What to write; docs/INTERCHANGE.md describes each format.",
)
@click.option("--output_dir", type=PATH, required=True, help="Folder to make; new or empty.")
@click.option("--split", default="all", help="train, validation, test or all.")
@json_option
def export(shard_dir: Path, record_format: str, output_dir: Path, split: str, json_file: Path | None) -> None:
    """Turn a trace folder into another tool's routing records; importing them gives the same traces.

    Router logits and lookahead logits have no place in these formats and are left out, which is said.
    """
    from traces.interchange.exporting import export_traces

    result = export_traces(shard_dir, output_dir, record_format, split=split)
    write_results(json_file, result.facts())
    for column in result.left_out:
        click.echo(f"{column} is left out: {record_format} has no place for it", err=True)
    click.echo(f"{output_dir}: {result.sequences} sequences, {result.tokens} tokens in {len(result.files)} files")
    spec = result.spec
    words = ["--format", record_format, "--num_experts", str(spec.num_experts), "--model_name", spec.model_name]
    files = [output_dir] if record_format == "flame" else [output_dir / name for name in result.files]
    words += ["--output_dir", "DIR", *map(str, files[:SHOWN_FILES])]
    click.echo(f"Back again: expert-speculation import {shlex.join(words)}" + " ..." * (len(files) > SHOWN_FILES))
