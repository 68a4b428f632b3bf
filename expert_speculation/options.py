"""Options that several verbs share, and the printing of results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_MODEL = "models/mini-mixtral"
PATH = click.Path(path_type=Path)


def shard_dir_option(command: Command) -> Command:
    """`--shard_dir`: the run folder of a trace or its `data/`."""
    text = "Trace folder: a run folder or its data/."
    return click.option("--shard_dir", type=PATH, required=True, help=text)(command)


def predictor_dirs_option(command: Command) -> Command:
    """`--predictor_dir`, repeatable."""
    return click.option(
        "--predictor_dir", "predictor_dirs", type=PATH, multiple=True, help="Trained predictor; repeat for several."
    )(command)


def device_option(command: Command) -> Command:
    """`--device`."""
    text = "auto (the GPU with most free memory, else the CPU), cpu, cuda, cuda:N."
    return click.option("--device", default="auto", help=text)(command)


def seed_option(command: Command) -> Command:
    """`--seed`."""
    return click.option("--seed", type=int, default=0, help="Seed of every random choice.")(command)


def model_option(command: Command) -> Command:
    """`--model`; the embedded mini-Mixtral is found wherever the project is installed."""
    text = "Model folder in transformers' layout, or a hub id."
    return click.option("--model", default=DEFAULT_MODEL, callback=_find_embedded, help=text)(command)


def json_option(command: Command) -> Command:
    """`--json FILE`."""
    text = "Also write the results there, machine-readable."
    return click.option("--json", "json_file", type=PATH, help=text)(command)


def write_results(json_file: Path | None, results: Any) -> None:
    """Write `results` to `--json FILE` when it was given."""
    from groundwork.atomic import write_text

    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, json.dumps(results, indent=2, default=str) + "\n")


def print_facts(facts: dict[str, Any]) -> None:
    """Print `name  value` lines, aligned."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _find_embedded(ctx: click.Context, option: click.Parameter, value: str) -> str:
    if value != DEFAULT_MODEL or Path(value).exists():
        return value
    from moe.mini import embedded_model

    return str(embedded_model() or value)
