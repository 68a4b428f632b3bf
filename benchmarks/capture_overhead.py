"""What does tracing cost beside the bare forward pass, and beside what one would write by hand?

    .venv/bin/python benchmarks/capture_overhead.py [--model models/mini-mixtral] [--sequences 64] [--repeats 15]

The same texts run, again and again and in turn, through
  bare     the base model's forward pass over our batches, nothing kept,
  traced   the same with the routers' hooks, routing sorted and copied to host memory,
  stored   the whole of it: traced, cut into sequences, token strings, Parquet, checked and listed,
  by hand  the language model with output_router_logits=True and its logits pickled, over our batches and one by one.
Each round gives the ratio of its processor time to that of the same round's bare run; printed are the medians of the
ratios with their quartiles, and the bytes that each writes a token. Then the share of each step of `stored`.
`--width` makes a random Mixtral of 8 layers instead: weights do not matter for what is measured here.
"""

import cProfile
import os
import pickle
import pstats
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from collection.plan import make_plan, make_spec
from collection.preparation import prepare
from collection.running import BatchRunner
from collection.settings import CollectSettings
from collection.tokens import TokenText
from collection.tracing import trace_shards
from collection.writing import Routed, write_shards
from groundwork.atomic import write_json
from groundwork.hardware import describe_device
from groundwork.progress import log
from moe.load import load_model, load_tokenizer
from moe.resident import ResidentTracer
from moe.routers import find_routers

STEPS = {
    "forward pass": ("modeling_", "forward"),
    "hooks on the routers": ("watching.py", "hook"),
    "sorting and copying routing": ("passes.py", "gather_passes"),
    "cutting into sequences": ("writing.py", "_cut"),
    "token strings": ("tokens.py", "strings"),
    "checking sequences": ("schema.py", "check"),
    "Parquet encoding": ("writer.py", "_flush"),
    "finishing the shard": ("writer.py", "commit"),
}


@click.command()
@click.option("--model", default="models/mini-mixtral", show_default=True)
@click.option("--width", type=int, help="Hidden size of a random Mixtral with the model's tokenizer; such as 1024.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--sequences", default=64, show_default=True)
@click.option("--max_length", default=256, show_default=True)
@click.option("--batch_tokens", default=8192, show_default=True)
@click.option("--store", default="weights", show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    model: str,
    width: int | None,
    device: str,
    dtype: str,
    store: str,
    repeats: int,
    json_file: Path | None,
    **sizes: int,
) -> None:
    """Print what tracing costs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = random_mixtral(model, width, folder / "model") if width else model
        settings = CollectSettings(
            model=model,
            device=device,
            dtype=dtype,
            store=tuple(store.split(",")),
            target_traces=sizes["sequences"],
            max_length=sizes["max_length"],
            batch_tokens=sizes["batch_tokens"],
            output_dir=folder / "run",
        )
        results = Bench(settings, folder).measure(repeats)
    log(f"{describe_device(torch.device(device))}, {results['tokens']} tokens, {results['padding']:.1%} padding")
    click.echo(f"{'':<24}{'time of bare':>14}{'quartiles':>18}{'bytes a token':>16}")
    for name, row in results["runs"].items():
        quartiles = "{:.3f} - {:.3f}".format(*row["quartiles"])
        click.echo(f"{name:<24}{row['ratio']:>14.3f}{quartiles:>18}{row['bytes_per_token'] or '':>16}")
    for name, share in results["steps"].items():
        click.echo(f"{name:<32}{share:>8.2%} of stored")
    if json_file is not None:
        write_json(json_file, results)


class Bench:
    """The same texts, run in several ways."""

    def __init__(self, settings: CollectSettings, folder: Path) -> None:
        prepared = prepare(settings)
        loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, language_model=True)
        self.settings, self.folder, self.layout = settings, folder, prepared.layout
        self.language_model: Any = loaded.model
        self.base: Any = self.language_model.model
        self.routers = find_routers(self.base)
        self.text = TokenText(loaded.tokenizer)
        self.plan = make_plan(self.layout, prepared.draws, make_spec(loaded, self.routers, settings), prepared.identity)

    def measure(self, repeats: int) -> dict[str, Any]:
        one_by_one = [[each] for each in range(len(self.layout.sequences))]
        runs: dict[str, Callable[[], int]] = {
            "bare": self.bare,
            "traced": self.traced,
            "stored": self.stored,
            "by hand, our batches": lambda: self.by_hand(self.layout.batches),
            "by hand, one by one": lambda: self.by_hand(one_by_one),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        sizes = {name: run() for name, run in runs.items()}  # once to warm up
        for number in range(repeats):
            order = list(runs)
            random.Random(number).shuffle(order)
            for name in order:
                started = time.process_time()
                runs[name]()
                seconds[name].append(time.process_time() - started)
        bare = np.array(seconds["bare"])
        tokens = sum(self.layout.num_tokens_S)
        rows = {}
        for name, own in seconds.items():
            ratios = np.array(own) / bare
            rows[name] = {
                "ratio": float(np.median(ratios)),
                "quartiles": [float(each) for each in np.quantile(ratios, [0.25, 0.75])],
                "bytes_per_token": round(sizes[name] / tokens, 1),
            }
        padding = self.layout.padding_share
        return {"tokens": tokens, "padding": padding, "runs": rows, "steps": self.steps(), "seconds": seconds}

    def bare(self) -> int:
        with torch.inference_mode():
            for batch in self.layout.batches:
                ids_BT, mask_BT = self.padded(batch)
                self.base(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return 0

    def traced(self) -> int:
        with self.tracer() as tracer:
            runner = BatchRunner(tracer)
            for batch in self.layout.batches:
                runner.run(batch, [self.layout.sequences[each] for each in batch])
        return 0

    def stored(self) -> int:
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir()
        with self.tracer() as tracer:
            trace_shards(run_dir, self.plan, self.layout, set(), BatchRunner(tracer), self.text)
        return sum(path.stat().st_size for path in (run_dir / "data").iterdir())

    def by_hand(self, batches: list[list[int]]) -> int:
        path = self.folder / "logits.pickle"
        with path.open("wb") as file, torch.inference_mode():
            for batch in batches:
                ids_BT, mask_BT = self.padded(batch)
                output = self.language_model(
                    input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, output_router_logits=True
                )
                pickle.dump((ids_BT.cpu(), mask_BT.cpu(), [logits.cpu() for logits in output.router_logits]), file)
            os.fsync(file.fileno())
        return path.stat().st_size

    def steps(self) -> dict[str, float]:
        """Return the share of each step in a stored run, its two threads' work one after the other."""
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir)
        run_dir.mkdir()
        profile = cProfile.Profile(time.process_time)
        with self.tracer() as tracer, profile:
            runner = BatchRunner(tracer)
            routed = []
            for batch in self.layout.batches:
                routing = runner.run(batch, [self.layout.sequences[each] for each in batch])
                routed.append(Routed([(batch, routing)]))
            write_shards(run_dir, self.plan.spec, self.plan.shards, self.layout, self.text, iter(routed))
        return shares(pstats.Stats(profile))

    def tracer(self) -> ResidentTracer:
        return ResidentTracer(self.base, self.routers, self.plan.spec.store, self.plan.spec.horizons)

    def padded(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [torch.from_numpy(self.layout.sequences[each].token_ids_T).long() for each in batch]
        ids_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([len(each) for each in texts])[:, None]
        return ids_BT.to(self.base.device), mask_BT.to(self.base.device, torch.long)


def shares(stats: pstats.Stats) -> dict[str, float]:
    """Return each step's share of the profiled time: that of its function with all that it calls, but other steps."""
    rows: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    found = dict.fromkeys(STEPS, 0.0)
    for place, (_, _, _, seconds, _) in rows.items():
        step = step_of(place)
        if step is not None:  # the model's forward holds those of its layers: the longest of them is the whole
            found[step] = max(found[step], seconds)
    for place, (_, _, _, _, callers) in rows.items():
        for caller, (_, _, _, seconds) in callers.items():
            outer = step_of(caller)
            if step_of(place) not in (None, outer) and outer is not None:
                found[outer] -= seconds
    total = stats.total_tt  # type: ignore[attr-defined]
    return {step: seconds / total for step, seconds in found.items()} | {"all else": 1 - sum(found.values()) / total}


def step_of(place: tuple[str, int, str]) -> str | None:
    name = Path(place[0]).name
    return next((step for step, (file, function) in STEPS.items() if file in name and function == place[2]), None)


def random_mixtral(model: str, width: int, folder: Path) -> str:
    """Save a Mixtral of the given width, as wide experts as the real one's in proportion, and return its folder."""
    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=int(3.5 * width),
        num_hidden_layers=8,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
