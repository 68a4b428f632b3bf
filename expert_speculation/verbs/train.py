"""`train`: fits a predictor."""

from typing import Any

import click

from expert_speculation.options import PATH, device_option, seed_option, shard_dir_option


@click.command()
@shard_dir_option
@click.option("--predictor", required=True, help="What to fit; an unknown name lists the known ones.")
@click.option("--output_dir", type=PATH, help="Predictor folder; models/<run>-<predictor> when not given.")
@click.option("--tokens", is_flag=True, help="Have interlayer use token ids too.")
@click.option("--option", multiple=True, help="NAME=VALUE of the predictor's own, VALUE in JSON; repeat for several.")
@click.option("--member", multiple=True, type=PATH, help="Folder of a predictor to stack in an ensemble; repeat.")
@click.option("--epochs", type=int, help="Passes over the train split; 10 when no limit is given.")
@click.option(
    "--max_minutes", type=float, help="Time limit; the learning rate falls towards whichever limit ends first."
)
@click.option("--max_steps", type=int, help="Limit of optimizer steps.")
@click.option("--batch_size", type=int, help="Sequences per step and accumulation; by tokens when not given.")
@click.option("--batch_tokens", type=int, help="Tokens per step and accumulation, about; 320 when nothing is given.")
@click.option("--gradient_accumulation_steps", type=int, default=1, help="Times as many sequences or tokens a step.")
@click.option("--learning_rate", type=float, help="AdamW's; Muon's follows it. 0.003 when not given.")
@click.option("--ema", type=float, help="Keep an average of the weights with this decay, such as 0.999.")
@device_option
@click.option("--precision", default="auto", help="auto (bfloat16 where the device multiplies it), float32, bfloat16.")
@click.option(
    "--memory_budget_gb", type=float, default=24.0, help="Memory that training may take, host and device each."
)
@click.option("--hold_out_dataset", multiple=True, help="Leave this data set out of training; repeat for several.")
@click.option("--only_dataset", multiple=True, help="Train on this data set alone; repeat for several.")
@click.option("--train_tokens", type=int, help="Train on the first so many tokens of a seeded order.")
@click.option("--track", help="Send the training record to trackio, tensorboard or wandb too.")
@seed_option
@click.option("--resume", is_flag=True, help="Continue an interrupted training.")
def train(option: tuple[str, ...], **settings: Any) -> None:
    """Fit a predictor of the next layers' experts on a trace folder.

    On several GPUs: torchrun --nproc_per_node 2 -m expert_speculation train ...
    """
    from speculation.training.distributed import Group
    from speculation.training.options import parse_options
    from speculation.training.trainer import TrainSettings
    from speculation.training.trainer import train as run

    folder = run(TrainSettings(**settings, options=parse_options(option)))
    if Group.of_environment().leads:
        click.echo(folder)
