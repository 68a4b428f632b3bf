"""`collect`: traces -> shards."""

from pathlib import Path
from typing import Any

import click

from expert_speculation.options import (
    PATH,
    ModeChoice,
    json_option,
    model_option,
    print_facts,
    seed_option,
    spoken_model,
    write_results,
)


class CountOrAuto(click.ParamType[Any]):
    """A whole number, or `auto`."""

    name = "integer or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"'{value}' is neither a whole number nor 'auto'.", param, ctx)


@click.command()
@model_option
@click.option(
    "--quantization",
    type=ModeChoice(["auto", "none", "int8", "nf4", "nf4-double"]),
    default="auto",
    help="Precision of the experts; auto quantises only what would not fit the GPU.",
)
@click.option(
    "--execution",
    type=click.Choice(["auto", "resident", "streamed"]),
    default="auto",
    help="resident keeps the whole model in memory; streamed reads one layer at a time, for all batches of a pass; "
    "auto streams what would not fit.",
)
@click.option(
    "--pass_tokens",
    type=int,
    default=2**19,
    help="Tokens that a streamed pass takes through the layers, in whole shards.",
)
@click.option(
    "--memory_budget_gb",
    type=float,
    help="Host memory for the hidden states of a streamed pass; the others go to disk. Half of what is free when not "
    "given.",
)
@click.option(
    "--datasets",
    default="installed",
    help="Mixes (installed, default, reasoning, code, dialogue), names, NAME=PATH or paths, separated by commas; "
    "each may end in :WEIGHT (docs/DATASETS.md).",
)
@click.option(
    "--dataset_root",
    type=PATH,
    help="Read registered data sets from NAME.jsonl, .parquet, .csv or .txt there, or from copies of hub folders.",
)
@click.option("--target_traces", type=int, default=1500, help="Sequences to trace, balanced over the data sets.")
@click.option("--max_length", type=int, default=512, help="Tokens at which a sequence is cut.")
@click.option("--min_tokens", type=int, default=8, help="Shorter texts are skipped and counted.")
@click.option("--generate", type=int, default=0, help="Tokens to decode, and trace, after each text.")
@click.option(
    "--temperature", type=float, default=0.8, help="Of the tokens that --generate samples; 0 takes the likeliest."
)
@click.option(
    "--batch_size",
    type=CountOrAuto(),
    help="Sequences per batch; auto finds the largest batch that fits; when not given, what --batch_tokens allows.",
)
@click.option("--batch_tokens", type=int, help="Padded tokens per batch; by the device's free memory when not given.")
@click.option(
    "--device",
    default="auto",
    help="auto (the GPU with most free memory, else the CPU), cpu, cuda, cuda:N; several as cuda:0,cuda:1 or all, a "
    "process each; cuda:0+cuda:1 hold the model together.",
)
@click.option("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16.")
@click.option("--attn_implementation", help="transformers' attention implementation, e.g. sdpa or eager.")
@click.option("--experts_implementation", help="transformers' experts implementation, e.g. eager or grouped_mm.")
@click.option("--shard_size_mb", type=float, default=256.0, help="Size of a shard, about; it holds whole sequences.")
@click.option("--output_dir", type=PATH, help="Run folder; routing_data/<model>[_<suffix>] when not given.")
@click.option("--output_suffix", help="Appended to the default run folder's name.")
@click.option("--store", default="weights", help="Columns beside the expert ids: weights,logits,lookahead.")
@click.option(
    "--lookahead", type=int, default=0, help="Horizons of stored lookahead logits; with --store lookahead at least 1."
)
@click.option(
    "--lookahead_norm",
    default="next",
    help="Lookahead logits of layer l, h layers ahead, read layer l-h's residual stream, under the norm of layer l "
    "(next) or of layer l-h (own).",
)
@click.option(
    "--sample_hidden", type=float, default=0.0, help="Share of tokens that carry their router inputs, such as 0.01."
)
@seed_option
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--dry_run", is_flag=True, help="Print what would be done, and stop.")
@click.option(
    "--measure",
    is_flag=True,
    help="First read a few layers from the disk and run a batch through them, to tell how long the run will take.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="What works the plan off: this machine, or a Ray cluster with a shared file system (docs/CLUSTER.md).",
)
@click.option(
    "--workers", type=int, help="Of --engine ray; one for each GPU, or each machine with --device cpu, when not given."
)
@click.option("--shard_data", is_flag=True, hidden=True, help="Accepted; shards are always written.")
@json_option
def collect(
    store: str,
    output_dir: Path | None,
    dry_run: bool,
    json_file: Path | None,
    shard_data: bool,
    **options: Any,
) -> None:
    """Trace what a model's routers choose over mixed texts, into Parquet shards."""
    from collection.settings import CollectSettings
    from groundwork.errors import IncompleteError
    from traces.run_folder import check_folder

    columns = tuple(name for name in store.replace(" ", "").split(",") if name)
    settings = CollectSettings(store=columns, output_dir=output_dir, **options)
    if output_dir is not None:
        check_folder(output_dir, resume=settings.resume)

    from collection.collector import (
        collect as run,  # takes seconds, with all that runs models: what could be refused is
    )
    from collection.collector import dry_run as plan_only

    if dry_run:
        facts = plan_only(settings)
        _print(facts, json_file)
        if facts["shortfall"]:
            click.echo(f"The run would end incomplete, with {facts['shortfall']}.")
        return
    result = run(settings)
    _print(result.facts(), json_file)
    if result.shortfall:
        raise IncompleteError(f"{result.run_dir}: holds {result.shortfall}")


def _print(facts: dict[str, Any], json_file: Path | None) -> None:
    write_results(json_file, facts)
    facts = {name: value for name, value in facts.items() if name != "shortfall"}
    executions, chosen = facts.pop("executions", {}), facts.get("execution")
    for source in facts.pop("sources"):
        skipped = "".join(f", {count} {reason}" for reason, count in sorted(source["skipped"].items()))
        click.echo(f"{source['name']:<20} {source['available']:>6} of {source['requested']} traces{skipped}")
    if "seconds" in facts:
        facts["seconds"] = round(facts["seconds"], 1)
    facts["padding_share"] = f"{facts['padding_share']:.1%}"
    spoken = {
        "batch_tokens_by_memory": "batch_tokens of a GPU with",
        "bytes": "bytes of traces, estimated",
        "bytes_free": "bytes free on that disk",
        "memory_bytes": "bytes of weights in memory",
    }
    facts = {spoken.get(name, name): value for name, value in facts.items()}
    facts |= {f"model {name}": value for name, value in spoken_model(facts.pop("model", {})).items()}
    facts.pop("forecast", None)  # it was said at the end of the run
    print_facts(facts)
    for name, needs in executions.items():
        click.echo(f"\n{name}{', chosen' if name == chosen else ''}: {_spoken(needs)}")
        if name == chosen and needs["disk_bytes"] > facts["bytes free on that disk"]:
            click.echo("The disk has less room than that: free some, or choose another --output_dir.")


def _spoken(needs: dict[str, Any]) -> str:
    """Return what an execution takes, in words."""

    def gb(size: float) -> str:
        return f"{size / 1e9:,.2f} GB"

    def time(seconds: float) -> str:
        return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"

    if not needs["possible"]:
        return f"not possible: {needs['refusal']}"
    to_start, later = needs["read_bytes_to_start"], needs["read_bytes"] - needs["read_bytes_to_start"]
    said = [f"quantization {needs['quantization']}"]
    said += [f"{gb(needs['device_bytes'])} on the device"] if needs["device_bytes"] is not None else []
    said += [f"{gb(needs['host_bytes'])} in RAM at most", f"{gb(needs['disk_bytes'])} on disk at most"]
    said.append(f"{gb(to_start)} read to start")
    if later:
        said.append(f"{gb(later)} in {needs['passes']} pass{'es' if needs['passes'] > 1 else ''}")
    if needs["seconds"] is not None:
        whole, before, each = (needs[f"seconds{part}"] for part in ("", "_to_start", "_per_million_tokens"))
        said.append(f"{time(whole)} for this run, {time(before)} of it to start ({time(each)} a million tokens)")
    return ", ".join(said)
