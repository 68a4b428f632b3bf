"""`demo`: the whole main job on the embedded mini-Mixtral and text found on this machine."""

from pathlib import Path

import click

from expert_speculation.options import PATH


@click.command()
@click.option("--output_dir", type=PATH, default="demo", help="Folder for everything the demo makes.")
@click.pass_context
def demo(ctx: click.Context, output_dir: Path) -> None:
    """Collect, train, evaluate and report on the embedded mini-Mixtral, printing the commands it runs."""
    from expert_speculation.tour import prepare, steps

    prepare(output_dir)
    for arguments in steps(output_dir):
        click.secho("\n$ expert-speculation " + " ".join(arguments), bold=True)
        ctx.find_root().command.main(arguments, prog_name="expert-speculation", standalone_mode=False)
