"""What does prefetching buy on different machines? One line for each, from the same traces and predictors.

    .venv/bin/python benchmarks/prefetching.py --shard_dir RUN --predictor_dir DIR [--predictor_dir DIR ...]
        [--machine laptop] [--machine rtx-3090:bf16] [--machine a100-40gb:bf16:50%] [--horizon 1] [--batch_size 1]
        [--json FOLDER]

Each machine is a hardware profile, with the precision of the experts and how many of them the GPU holds where those are
not what `simulate` takes by itself. Printed are tokens per second of the best caching without a predictor, and in times
that: the best real row with each predictor, perfect predictions as far ahead, and an oracle that knows a whole token,
with 95 % intervals over sequences; the recall from which prefetching pays; then the three sentences of each machine.
With --json the whole results are written there, for `report --simulation`.
"""

import json
from pathlib import Path
from typing import Any

import click

from groundwork.profiles.loading import hardware_profile, model_profile_for
from prefetch.settings import SimulateSettings
from prefetch.simulate import simulate
from speculation.predictor import load_predictors
from traces.reader import TraceDataset

MACHINES = ("laptop", "rtx-3090:bf16", "rtx-4090:bf16", "a100-40gb:bf16", "h100:bf16")


@click.command()
@click.option("--shard_dir", required=True, type=click.Path(path_type=Path))
@click.option("--predictor_dir", "predictor_dirs", required=True, multiple=True, type=click.Path(path_type=Path))
@click.option("--machine", "machines", multiple=True, default=MACHINES, show_default=True)
@click.option("--horizon", default=1, show_default=True)
@click.option("--batch_size", default=1, show_default=True)
@click.option("--json", "json_dir", type=click.Path(path_type=Path))
def main(
    shard_dir: Path,
    predictor_dirs: tuple[Path, ...],
    machines: tuple[str, ...],
    horizon: int,
    batch_size: int,
    json_dir: Path | None,
) -> None:
    """Print a Markdown table, and the answers."""
    dataset = TraceDataset(shard_dir)
    predictors = load_predictors(predictor_dirs)
    model = model_profile_for(dataset.spec.model_name)
    names = list(predictors)
    print(
        f"| machine | experts held | best caching, tokens/s | {' | '.join(names)} | perfect | oracle | "
        "pays from a recall of |\n|" + "---|" * (6 + len(names))
    )
    answers = []
    for machine in machines:
        hardware, _, rest = machine.partition(":")
        precision, _, held = rest.partition(":")
        settings = SimulateSettings(
            precision=precision or None, cache_experts=held or None, horizon=horizon, batch_size=batch_size
        )
        result = simulate(dataset, predictors, model, hardware_profile(hardware), settings)
        print(_line(result, names), flush=True)
        answers.append(f"\n{_title(result)}\n\n" + "\n".join(f"- {each}" for each in result["answers"]))
        if json_dir is not None:
            json_dir.mkdir(parents=True, exist_ok=True)
            (json_dir / f"{machine.replace(':', '-').replace('%', '')}.json").write_text(json.dumps(result, indent=1))
    print("\n".join(answers))


def _title(result: dict[str, Any]) -> str:
    return f"{result['hardware']['name']}, {result['machine']['precision']}"


def _line(result: dict[str, Any], names: list[str]) -> str:
    machine = result["machine"]
    caching = next(
        row for row in result["rows"] if row["prefetcher"] == "none" and row["policy"] == result["best_caching"]
    )
    speed = caching["tokens_per_s"]
    even = next(point["break_even"] for point in result["sweep"]["by_link"] if point["link_factor"] == 1)
    from_recall = {"always": "any", "never": "none", "above": f"{even['recall'] or 0:.2f}"}[even["pays"]]
    return (
        f"| {_title(result)} | {machine['cache_experts'] / machine['experts']:.0%} | {speed['value']:.1f} "
        f"[{speed['low']:.1f}, {speed['high']:.1f}] ({caching['policy']}) | "
        + " | ".join(_times(result, name) for name in [*names, "perfect", "oracle"])
        + f" | {from_recall} |"
    )


def _times(result: dict[str, Any], name: str) -> str:
    """The best row of a prefetcher under a policy that needs no foresight."""
    rows = [row["over_caching"] for row in result["rows"] if row["prefetcher"] == name and row["policy"] != "belady"]
    best = max(rows, key=lambda gain: gain["value"])
    return f"{best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}]"


if __name__ == "__main__":
    main()
