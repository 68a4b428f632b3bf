"""Which model families can be traced, and which quantised: the tables of docs/MODELS.md.

    python benchmarks/families.py [docs/MODELS.md]

walks every mixture-of-experts family of the installed transformers and prints the tables, or writes them into the file.
A test traces each covered family, compares it with what the experts received, and compares the file with the walk.
"""

import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import transformers
from tiny_models import model_types, tiny_config

from groundwork.errors import ConfigurationError
from moe.description import sketch_config
from moe.split_experts import find_split

MODES = "int8, nf4, nf4-double"
START, END = "<!-- start: benchmarks/families.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Verdict:
    """What the collector does with one model type: traces and perhaps quantises it, or refuses it for a reason."""

    model_type: str
    router_class: str = ""
    quantised: bool = False
    refusal: str = ""


def judge(model_type: str) -> Verdict | None:
    """Return the verdict on a model type; None for parts of models that are dense themselves."""
    try:
        sketch, layout = sketch_config(tiny_config(model_type), torch.float32)
    except ConfigurationError as error:
        _, known, reason = str(error).partition(" can not be traced: ")
        return Verdict(model_type, refusal=reason.rpartition(";")[0]) if known else None
    return Verdict(model_type, layout.router_class, find_split(sketch, layout) is not None)


def tables() -> str:
    """Return the tables of covered and of refused model types, in Markdown."""
    found = [verdict for verdict in map(judge, model_types()) if verdict]
    covered = sorted((each for each in found if not each.refusal), key=lambda each: (each.router_class, each.quantised))
    lines = [
        f"With transformers {transformers.__version__}: {len(covered)} model types are traced, "
        f"{len(found) - len(covered)} refused.",
        "",
        f"| model type | router | {MODES} |",
        "|---|---|---|",
    ]
    for (router, quantised), group in groupby(covered, key=lambda each: (each.router_class, each.quantised)):
        names = ", ".join(f"`{each.model_type}`" for each in group)
        lines.append(f"| {names} | {router} | {'yes' if quantised else 'no'} |")
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| `{each.model_type}` | {each.refusal} |" for each in found if each.refusal]
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """Return the document `text` with the tables between its two marks replaced by today's."""
    before, _, rest = text.partition(START)
    return before + START + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if len(sys.argv) > 1:
        document = Path(sys.argv[1])
        document.write_text(with_tables(document.read_text()))
    else:
        print(tables(), end="")
