"""`train`: fits a predictor."""

from typing import Any

import click

from expert_speculation.options import PATH, device_option, seed_option, shard_dir_option


@click.command()
@shard_dir_option
@click.option("--predictor", required=True, help="frequency, repeat, markov, gate_lookahead or interlayer.")
@click.option("--output_dir", type=PATH, help="Predictor folder; models/<run>-<predictor> when not given.")
@click.option("--batch_size", type=int, help="Sequences per micro-batch; the predictor's own when not given.")
@click.option("--gradient_accumulation_steps", type=int, default=1, help="Micro-batches per optimizer step.")
@device_option
@click.option(
    "--memory_budget_gb", type=float, default=24.0, help="Memory that training may take, host and device each."
)
@click.option("--epochs", type=int, help="Passes over the train split.")
@click.option(
    "--max_minutes", type=float, help="Time limit; the learning rate falls towards whichever limit ends first."
)
@click.option("--max_steps", type=int, help="Limit of optimizer steps.")
@click.option("--hold_out_dataset", multiple=True, help="Leave this data set out of training; repeat for several.")
@seed_option
@click.option("--resume", is_flag=True, help="Continue an interrupted training.")
def train(**options: Any) -> None:
    """Fit a predictor of the next layers' experts on a trace folder."""
    from speculation.trainer import TrainSettings
    from speculation.trainer import train as run

    click.echo(run(TrainSettings(**options)))
