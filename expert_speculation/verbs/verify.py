"""`verify`: checks a trace folder."""

from pathlib import Path

import click

from expert_speculation.options import PATH


@click.command()
@click.argument("shard_dir", type=PATH)
def verify(shard_dir: Path) -> None:
    """Check a trace folder against its manifest: checksums, schema, ranges, values. Exit code 3 on any fault."""
    from groundwork.errors import IncompleteError
    from traces.verify import verify as run

    faults = run(shard_dir)
    for fault in faults:
        click.echo(f"{fault.path}: {fault.problem}; {fault.remedy}")
    if faults:
        raise IncompleteError(f"{shard_dir}: {len(faults)} fault{'s' if len(faults) > 1 else ''} found")
    click.echo(f"{shard_dir}: no fault found")
