"""`verify`: checks a trace folder, and repairs it when asked to."""

from pathlib import Path

import click

from expert_speculation.options import PATH, json_option, write_results


@click.command()
@click.argument("shard_dir", type=PATH)
@click.option(
    "--repair",
    is_flag=True,
    help="First mend what can be proven: rebuild manifest and card, move damaged shards to damaged/. Deletes nothing.",
)
@json_option
def verify(shard_dir: Path, repair: bool, json_file: Path | None) -> None:
    """Check a trace folder and print one line per fault with its remedy. Exit code 3 on any fault.

    \b
    plan       its own digest, the checksum of its table, its shards against its sequences
    manifest   each line's own digest, its range against the plan, lines torn, missing or doubled
    shards     size, sha256, checksums of footer, column chunks and pages; footer against plan; statistics;
               whole sequences, as planned; expert ids below E and distinct, weights finite, in order and
               normalised where the footer says so; nothing but shards in data/
    card       its own digest, and its counts against plan and manifest

    A folder of bare shards is checked for what it is.
    """
    from groundwork.errors import IncompleteError
    from traces.repair import repair as run_repair
    from traces.verify import examine

    actions = []
    if repair:
        for action in run_repair(shard_dir):
            click.echo(action)
            actions.append(action)
    found = examine(shard_dir)
    for fault in found.faults:
        click.echo(str(fault))
    faults = [{"path": str(each.path), "problem": each.problem, "remedy": each.remedy} for each in found.faults]
    facts = {"folder": str(shard_dir), "shards": len(found.entries), "actions": actions, "faults": faults}
    write_results(json_file, facts)
    if faults:
        raise IncompleteError(f"{shard_dir}: {len(faults)} fault{'s' if len(faults) > 1 else ''} found")
    shards = f"{len(found.entries)} {'' if found.is_run else 'bare '}shard{'s' if len(found.entries) != 1 else ''}"
    remark = "" if found.is_run else ", with neither plan nor manifest to compare with"
    click.echo(f"{shard_dir}: no fault found in {shards}{remark}")
