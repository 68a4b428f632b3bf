"""docs/CLI.md, generated from the commands themselves: `python -m expert_speculation.reference docs/CLI.md`."""

import inspect
import sys
from pathlib import Path
from typing import Any

import click

from expert_speculation.command import cli


def render() -> str:
    """The reference as Markdown: one section per verb, one table row per option."""
    lines = [
        "# Command-line reference",
        "",
        "Written by `make docs` from the commands themselves. Every option may also be spelled with hyphens.",
        "",
    ]
    for name, command in cli.commands.items():
        arguments = " ".join(item.make_metavar(click.Context(command)) for item in command.params if _is_argument(item))
        lines += [f"## {name}", "", f"`expert-speculation {name}{' ' + arguments if arguments else ''} [OPTIONS]`", ""]
        lines += [_prose(command.help or ""), "", "| option | default | what |", "|---|---|---|"]
        lines += [_row(item) for item in command.params if isinstance(item, click.Option) and not item.hidden]
        lines.append("")
    return "\n".join(lines)


def _prose(text: str) -> str:
    """A help text as Markdown; what click is told to keep as it is, by a backspace, stands between fences."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        f"```\n{each.removeprefix(chr(8)).strip()}\n```" if each.startswith("\b") else each for each in paragraphs
    )


def _is_argument(item: click.Parameter) -> bool:
    return isinstance(item, click.Argument)


def _row(option: click.Option) -> str:
    kind = ""
    if isinstance(option.type, click.Choice):
        kind = " " + "\\|".join(option.type.choices)
    elif not option.is_flag:
        kind = f" {option.type.name}"
    notes = " Repeatable." if option.multiple and "repeat" not in (option.help or "") else ""
    return f"| `{option.opts[0]}`{kind} | {_default(option)} | {option.help}{notes} |"


def _default(option: click.Option) -> str:
    value: Any = option.to_info_dict()["default"]
    if option.required:
        return "required"
    return "" if value is None or value is False or value == () or "Sentinel" in repr(value) else f"`{value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render())
