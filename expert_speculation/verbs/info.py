"""`info`: what a trace folder, predictor or model holds."""

from pathlib import Path

import click

from expert_speculation.options import json_option, print_facts, write_results


@click.command()
@click.argument("path")
@json_option
def info(path: str, json_file: Path | None) -> None:
    """Say what a trace folder, a predictor or a model holds, without loading weights."""
    from expert_speculation.inspection import describe

    facts = describe(path)
    print_facts(facts)
    write_results(json_file, facts)
