"""Options that several verbs share, and the printing of results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_MODEL = "models/mini-mixtral"
PATH = click.Path(path_type=Path, readable=False)  # what can not be read is refused below, with the remedy


class ModeChoice(click.Choice[str]):
    """A choice that lists its values as they are written, though `nf4_double` is taken too."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"'{value}' is not one of {', '.join(self.choices)}."

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return f"[{'|'.join(self.choices)}]"


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
    return click.option("--model", default=DEFAULT_MODEL, callback=find_embedded, help=text)(command)


def json_option(command: Command) -> Command:
    """`--json FILE`."""
    text = "Also write the results there, machine-readable."
    return click.option("--json", "json_file", type=PATH, callback=_no_folder, help=text)(command)


def _no_folder(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a folder before the work, whose results could not be written there."""
    from groundwork.errors import ConfigurationError

    if value is not None and value.is_dir():
        raise ConfigurationError(
            f"--json {value}: is a folder, wanted a file to write, such as {value / 'results.json'}"
        )
    return value


def write_results(json_file: Path | None, results: Any) -> None:
    """Write `results` to `--json FILE` when it was given."""
    from groundwork.atomic import write_text
    from groundwork.json_rows import dumps_rows

    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, dumps_rows(results) + "\n")


def print_facts(facts: dict[str, Any]) -> None:
    """Print `name  value` lines, aligned: what is known, and bytes in units that people read."""
    facts = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {_readable(name, value)}")


def spoken_model(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a model as they are printed: its bytes in each mode together, the plain one among them."""
    if "parameter_bytes" not in facts:
        return facts
    whole = {"none": facts["parameter_bytes"]["total"]} if facts["quantization"] == "none" else {}
    spoken = {
        "parameter_bytes": "bytes by component" if whole else "bytes before quantising",
        "quantized_bytes": "bytes by --quantization",
    }
    facts = facts | {"quantized_bytes": whole | facts["quantized_bytes"]}
    return {spoken.get(name, name): value for name, value in facts.items() if value != {}}


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(name, each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return _ranges(value) if name.endswith("moe_layers") else ", ".join(map(str, value))
    if not isinstance(value, int) or isinstance(value, bool):
        return str(value)
    return _spoken_bytes(value) if "bytes" in name else f"{value:,}"


def _spoken_bytes(count: int) -> str:
    size, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= pair[0]), (1, "bytes"))
    return f"{count / size:.1f} {unit}" if size > 1 else f"{count} {unit}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as `0, 2-7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def find_embedded(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return the place of the embedded model where that is what `value` names from any folder, else `value`."""
    if value != DEFAULT_MODEL or Path(value).exists():
        return value
    from moe.embedded import embedded_model

    return str(embedded_model() or value)
