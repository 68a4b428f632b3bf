"""How many token-layer steps does the simulation make in a second, beside a plain Python loop?

    .venv/bin/python benchmarks/simulator.py [--shard_dir RUN] [--tokens 20000] [--share 0.5]

Decodes the same routing, without a predictor, on one core: compiled (`prefetch.kernel`), in plain Python with the same
events (`prefetch.reference`, on the first tokens only), and with a loop that counts the hits of one LRU cache and knows
neither time nor link, which is what is written in an afternoon (its hits must be those of the compiled run). Without
--shard_dir the routing is random, of gpt-oss-20b's shape: 24 layers, 4 of 32 experts, half of them the last token's.
Compilation, a few seconds once per installation, is not counted.
"""

import time
from collections import OrderedDict
from pathlib import Path

import click
import numpy as np

from groundwork.profiles.loading import hardware_profile, model_profile
from prefetch import reference
from prefetch.simulation import POLICIES, Simulation
from prefetch.timing import Timing
from prefetch.workload import Workload, read_workload
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset

PLAIN_TOKENS = 60


@click.command()
@click.option("--shard_dir", type=click.Path(path_type=Path), help="Real traces; random routing when not given.")
@click.option("--tokens", default=20_000, show_default=True)
@click.option("--share", default=0.5, show_default=True, help="Of all experts, what the GPU holds.")
def main(shard_dir: Path | None, tokens: int, share: float) -> None:
    """Print a Markdown table of steps per second."""
    workload = _random(tokens) if shard_dir is None else read_workload(TraceDataset(shard_dir), "all")
    workload, _ = workload.of(workload.part(tokens, seed=0))
    short = _first(workload, PLAIN_TOKENS)
    shape = workload.shape
    timing = Timing.of(model_profile("gpt-oss-20b"), hardware_profile("rtx-3090"), None, 1)
    capacity = round(share * shape.num_layers * shape.num_experts)
    steps = int(workload.lengths_S.sum()) * shape.num_layers
    print(
        f"{steps:,} token-layer steps, {shape}, {capacity} experts held, one core\n\n"
        "| policy | slots | million steps/s | times plain Python with the same events | times a loop of LRU hits |\n"
        "|---|---|---|---|---|"
    )
    for pooled in (True, False):
        loop_hits, loop_s = _loop(workload, capacity, pooled)
        for policy in POLICIES:
            if policy in ("guided", "static"):
                continue  # one needs a predictor, the other is lru with fewer slots
            simulation = Simulation(workload, timing, capacity, pooled=pooled)
            simulation.changed(workload=short).run(policy)  # compiles
            compiled_s, hits = _timed(simulation, policy)
            if policy == "lru":
                assert hits == loop_hits, f"{hits} hits, but the loop counts {loop_hits}"
            began = time.process_time()
            simulation.changed(workload=short).run(policy, run=reference.run)
            plain_s = (time.process_time() - began) / (PLAIN_TOKENS * shape.num_layers)
            print(
                f"| {policy} | {'pooled' if pooled else 'per layer'} | {steps / compiled_s / 1e6:.2f} | "
                f"{plain_s / (compiled_s / steps):.0f} | {loop_s / compiled_s:.1f} |"
            )


def _timed(simulation: Simulation, policy: str) -> tuple[float, int]:
    """Seconds of processor time of a run, the best of three, and its hits."""
    spent = []
    for _ in range(3):
        began = time.process_time()
        hits = simulation.run(policy).totals["hits"]
        spent.append(time.process_time() - began)
    return min(spent), hits


def _loop(workload: Workload, capacity: int, pooled: bool) -> tuple[int, float]:
    """Count the hits of LRU, experts of a layer taking slots together; return them and the seconds."""
    layers = workload.shape.num_layers
    sizes = [capacity] if pooled else [capacity // layers + (layer < capacity % layers) for layer in range(layers)]
    caches: list[OrderedDict[tuple[int, int], None]] = [OrderedDict() for _ in sizes]
    ids = workload.expert_ids_TLK.tolist()
    hits = 0
    began = time.process_time()
    for token in ids:
        for layer, chosen in enumerate(token):
            cache, size = (caches[0], sizes[0]) if pooled else (caches[layer], sizes[layer])
            needed = sorted((layer, expert) for expert in chosen)
            hits += sum(each in cache for each in needed)
            for each in needed:
                cache[each] = None
                cache.move_to_end(each)
            while len(cache) > size:
                cache.popitem(last=False)
    return hits, time.process_time() - began


def _random(tokens: int) -> Workload:
    generator = np.random.default_rng(0)
    ids_TLK = np.argpartition(generator.random((tokens, 24, 32), dtype=np.float32), 3, axis=2)[:, :, :4]
    for token in range(1, tokens):  # half of the layers repeat the last token's experts
        same_L = generator.random(24) < 0.5
        ids_TLK[token, same_L] = ids_TLK[token - 1, same_L]
    lengths_S = np.full(-(-tokens // 300), 300)
    lengths_S[-1] = tokens - lengths_S[:-1].sum()
    return Workload(RoutingShape(24, 32, 4), ids_TLK.astype(np.uint16), lengths_S, ["random"] * len(lengths_S), True)


def _first(workload: Workload, tokens: int) -> Workload:
    return Workload(workload.shape, workload.expert_ids_TLK[:tokens], np.array([tokens]), ["random"], True)


if __name__ == "__main__":
    main()
