"""`generate`: samples a language model."""

from typing import Any

import click

from expert_speculation.options import device_option, model_option, seed_option


@click.command()
@model_option
@click.option("--prompt", default="", help="Text to continue.")
@click.option("--max_new_tokens", type=click.IntRange(min=1), default=128, help="Tokens to add.")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.8, help="0 takes the likeliest token.")
@device_option
@seed_option
def generate(**options: Any) -> None:
    """Sample text from a model, the embedded mini-Mixtral when none is named."""
    from moe.generate import generate as run

    click.echo(run(**options))
