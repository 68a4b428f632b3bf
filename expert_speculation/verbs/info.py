"""`info`: what a trace folder, predictor or model holds."""

from pathlib import Path

import click

from expert_speculation.options import find_embedded, json_option, print_facts, spoken_model, write_results


@click.command()
@click.argument("path", callback=find_embedded)
@json_option
def info(path: str, json_file: Path | None) -> None:
    """Say what a trace folder, a predictor or a model holds, without loading weights."""
    from expert_speculation.inspection import describe

    facts = describe(path)
    print_facts(spoken_model(facts))
    write_results(json_file, facts)
