"""Tiny trace folders of a generator whose structure is known, so that what a predictor can learn is known too.

First expert of layer 0: one more than the token before's, four times in five. First expert of a layer above: a fixed
permutation of the one below, nine times in ten. Second expert: the sequence's own topic shifted by the layer. So markov
learns the first, the token before tells the second, and only a predictor that sees both gets the set right.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter

MakeTraces = Callable[..., Path]


def make_spec(layers: int, experts: int, top_k: int, store: tuple[str, ...], order: str) -> TraceSpec:
    return TraceSpec(
        model_name="synthetic",
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        moe_layers=tuple(range(layers)),
        expert_order=order,
        weights_normalized=True if "weights" in store else None,
        quantization="none",
        model_dtype="float32",
        router_dtype="float32",
        plan_fingerprint="synthetic",
        store=store,
        horizons=3 if "lookahead" in store else 0,
    )


def make_sequence(spec: TraceSpec, number: int, tokens: int, rng: np.random.Generator) -> SequenceTrace:
    layers, experts, top_k = spec.num_layers, spec.num_experts, spec.top_k
    permutations = np.stack([np.random.default_rng(layer).permutation(experts) for layer in range(layers)])
    topic = rng.integers(experts)
    ids = np.empty((tokens, layers, top_k), dtype=np.int64)
    first = rng.integers(experts)
    for token in range(tokens):
        first = (first + 1) % experts if rng.random() < 0.8 else rng.integers(experts)
        for layer in range(layers):
            here = first if layer == 0 else permutations[layer][ids[token, layer - 1, 0]]
            here = rng.integers(experts) if layer and rng.random() < 0.1 else here
            others = [(topic + layer + step) % experts for step in range(experts)]
            ids[token, layer] = [here, *[other for other in others if other != here][: top_k - 1]]
    hot = np.zeros((tokens, layers, experts), dtype=np.float32)
    np.put_along_axis(hot, ids, 1.0, axis=2)
    optional = {}
    if "weights" in spec.store:
        weights = np.sort(rng.random((tokens, layers, top_k)) + 0.1, axis=2)[..., ::-1]
        optional["routing_weights_TLK"] = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float16)
    if "logits" in spec.store:
        optional["router_logits_TLE"] = (hot + rng.normal(0, 0.1, hot.shape)).astype(np.float16)
    if "lookahead" in spec.store:
        ahead = np.stack([hot + rng.normal(0, 0.3 * h, hot.shape) for h in range(1, spec.horizons + 1)], axis=1)
        for h in range(1, spec.horizons + 1):
            ahead[:, h - 1, :h] = 0
        optional["lookahead_logits_THLE"] = ahead.astype(np.float16)
    return SequenceTrace(
        dataset=("prose", "code")[number % 2],
        sequence_id=number,
        sequence_key=f"text-{number}",
        token_ids_T=rng.integers(0, 1000, tokens).astype(np.int32),
        tokens_T=["x"] * tokens,
        phase_T=np.zeros(tokens, dtype=np.uint8),
        expert_ids_TLK=ids.astype(spec.id_dtype),
        **optional,
    )


@pytest.fixture(scope="session")
def make_traces(tmp_path_factory: pytest.TempPathFactory) -> MakeTraces:
    """Writes a trace folder of two shards and returns it."""

    def make(
        *,
        sequences: int = 80,
        layers: int = 4,
        experts: int = 8,
        top_k: int = 2,
        store: tuple[str, ...] = ("weights",),
        order: str = "weight",
        seed: int = 0,
    ) -> Path:
        run = tmp_path_factory.mktemp("run")
        spec = make_spec(layers, experts, top_k, store, order)
        rng = np.random.default_rng(seed)
        made = [make_sequence(spec, number, int(rng.integers(8, 40)), rng) for number in range(sequences)]
        middle = sequences // 2
        for index, part in enumerate((made[:middle], made[middle:])):
            first = part[0].sequence_id
            planned = PlannedShard(index, first, first + len(part), sum(len(s.expert_ids_TLK) for s in part))
            with ShardWriter(run, spec, planned) as writer:
                for sequence in part:
                    writer.write(sequence)
                writer.commit()
        return run

    return make


@pytest.fixture(scope="session")
def run_dir(make_traces: MakeTraces) -> Path:
    return make_traces(store=("weights", "logits", "lookahead"))


@pytest.fixture(scope="session")
def dataset(run_dir: Path) -> TraceDataset:
    return TraceDataset(run_dir)
