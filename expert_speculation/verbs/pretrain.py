"""`pretrain`: makes a mini-Mixtral."""

from pathlib import Path
from typing import Any

import click

from expert_speculation.options import PATH, device_option, json_option, print_facts, seed_option, write_results


@click.command()
@click.option("--size", default="demo", help="tiny, demo or 172m.")
@click.option(
    "--text",
    type=PATH,
    multiple=True,
    help='.jsonl with {"text": ...} a line, .txt with blank lines between documents, or a folder; repeat for several.',
)
@click.option("--output_dir", type=PATH, help="Model folder to write.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps; the size's own when not given.")
@click.option(
    "--batch_size", type=click.IntRange(min=1), help="Sequences per optimizer step; the size's own when not given."
)
@click.option(
    "--micro_batch", type=click.IntRange(min=1), default=16, help="Sequences that go through the model at once."
)
@click.option("--learning_rate", type=float, help="Peak learning rate; the size's own when not given.")
@click.option(
    "--balance_weight",
    type=click.FloatRange(min=0.0),
    default=0.01,
    help="Weight of the loss that balances experts, for each layer by itself.",
)
@click.option("--init_from", type=PATH, help="Start from this trained model of the same size, with its tokenizer.")
@click.option("--checkpoint_minutes", type=float, default=5.0, help="Time between checkpoints.")
@click.option(
    "--stop_after", type=click.IntRange(min=1), help="Stop with a checkpoint after so many steps of this call."
)
@device_option
@seed_option
@click.option("--resume", is_flag=True, help="Continue an interrupted training.")
@click.option("--dry_run", is_flag=True, help="Print the parameter table, and stop.")
@json_option
def pretrain(
    size: str, text: tuple[Path, ...], output_dir: Path | None, dry_run: bool, json_file: Path | None, **options: Any
) -> None:
    """Train a small Mixtral and its tokenizer from text files."""
    from moe.mini import parameter_table
    from moe.mini import size as preset

    if dry_run:
        table = parameter_table(preset(size))
        for component, count in table:
            click.echo(f"{component:<12} {count:>13,}")
        write_results(json_file, dict(table))
        return
    if not text or output_dir is None:
        raise click.UsageError("pretrain needs --text and --output_dir (or --dry_run)")
    from moe.training.pretrain import PretrainSettings
    from moe.training.pretrain import pretrain as run

    record = run(PretrainSettings(size=size, text=text, output_dir=output_dir, **options))
    print_facts(
        {f"held-out loss, {name}": f"{loss:.3f} nats per token" for name, loss in record["held_out_loss"].items()}
    )
    write_results(json_file, record)
