"""Workloads and machines small enough to be reckoned by hand, and a folder of traces to be decoded on them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from prefetch.timing import Timing
from prefetch.workload import Workload
from speculation.predictor import RoutingShape
from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter

LAYERS, EXPERTS, TOP_K = 4, 8, 2


@pytest.fixture(scope="session")
def make_workload() -> Callable[..., Workload]:
    """Returns a function that makes a workload of routing (T, L, K), by default one sequence."""

    def make(ids_TLK: Any, experts: int, lengths: list[int] | None = None) -> Workload:
        ids_TLK = np.asarray(ids_TLK, dtype=np.uint16)
        lengths = [len(ids_TLK)] if lengths is None else lengths
        shape = RoutingShape(ids_TLK.shape[1], experts, ids_TLK.shape[2])
        return Workload(shape, ids_TLK, np.array(lengths), ["prose"] * len(lengths), True)

    return make


@pytest.fixture(scope="session")
def random_workload(make_workload: Callable[..., Workload]) -> Callable[..., Workload]:
    """Returns a function that makes a workload of random routing, some experts of which are used more than others."""

    def make(lengths: list[int], layers: int = 3, experts: int = 6, top_k: int = 2, seed: int = 0) -> Workload:
        rng = np.random.default_rng(seed)
        taste_LE = rng.random((layers, experts)) + 0.2
        ids_TLK = np.argsort(-rng.random((sum(lengths), layers, experts)) * taste_LE, axis=2)[:, :, :top_k]
        return make_workload(ids_TLK, experts, lengths)

    return make


@pytest.fixture(scope="session")
def cycling(make_workload: Callable[..., Workload]) -> Callable[..., Workload]:
    """Returns a function that makes a workload of one layer and one expert a token: 0, 1, 2 and so on, round and round.

    With a cache of fewer experts than a round has, the one needed next is always the one used longest ago.
    """

    def make(tokens: int, experts: int, sequences: int = 1) -> Workload:
        ids_TLK = (np.arange(tokens) % experts)[:, None, None]
        return make_workload(ids_TLK, experts, [tokens // sequences] * sequences)

    return make


@pytest.fixture(scope="session")
def make_timing() -> Callable[..., Timing]:
    """Returns a function that makes a machine's times in ns; a layer's experts take `expert` for each needed."""

    def make(
        *, attention: int = 100, expert: int = 10, other: int = 40, transfer: int = 1000, read: int = 3000,
        batch: int = 1, experts: int = EXPERTS,
    ) -> Timing:  # fmt: skip
        return Timing(
            expert_bytes=1_000_000,
            transfer_ns=transfer,
            read_ns=read,
            attention_ns_A=np.full(batch + 1, attention),
            experts_ns_AE=np.tile(np.arange(experts + 1) * expert, (batch + 1, 1)),
            other_ns_A=np.full(batch + 1, other),
        )

    return make


def make_sequence(spec: TraceSpec, number: int, tokens: int, phase: int, rng: np.random.Generator) -> SequenceTrace:
    """First expert of layer 0: one more than the token before's, four times in five; above, one more than below."""
    ids_TLK = np.empty((tokens, spec.num_layers, spec.top_k), dtype=np.int64)
    first, topic = rng.integers(spec.num_experts), 1 + rng.integers(spec.num_experts - 1)
    for token in range(tokens):
        first = first + 1 if rng.random() < 0.8 else rng.integers(spec.num_experts)
        for layer in range(spec.num_layers):
            ids_TLK[token, layer] = first + layer, first + layer + topic
    weights = np.sort(rng.random(ids_TLK.shape) + 0.1, axis=2)[..., ::-1]
    return SequenceTrace(
        dataset=("prose", "code")[number % 2],
        sequence_id=number,
        sequence_key=f"text-{number}",
        token_ids_T=rng.integers(0, 1000, tokens).astype(np.int32),
        tokens_T=["x"] * tokens,
        phase_T=np.full(tokens, phase, dtype=np.uint8),
        expert_ids_TLK=(ids_TLK % spec.num_experts).astype(spec.id_dtype),
        routing_weights_TLK=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        lookahead_logits_THLE=(
            rng.normal(size=(tokens, spec.horizons, spec.num_layers, spec.num_experts)).astype(np.float16)
            if spec.horizons
            else None
        ),
    )


@pytest.fixture(scope="session")
def make_traces(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TraceDataset]:
    """Returns a function that writes a trace folder of one shard: decoded tokens, or those of prompts.

    `horizons` is how many layers ahead the traces hold lookahead logits, which are random.
    """

    def make(sequences: int = 60, *, decoded: bool = True, horizons: int = 0) -> TraceDataset:
        run, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
        spec = TraceSpec(
            model_name="tiny",
            num_layers=LAYERS,
            num_experts=EXPERTS,
            top_k=TOP_K,
            moe_layers=tuple(range(LAYERS)),
            expert_order="weight",
            weights_normalized=True,
            quantization="none",
            model_dtype="float32",
            router_dtype="float32",
            plan_fingerprint="tiny",
            store=("weights", "lookahead") if horizons else ("weights",),
            horizons=horizons,
        )
        made = [make_sequence(spec, each, int(rng.integers(6, 20)), int(decoded), rng) for each in range(sequences)]
        planned = PlannedShard(0, 0, sequences, sum(each.num_tokens for each in made))
        with ShardWriter(run, spec, planned) as writer:
            for sequence in made:
                writer.write(sequence)
            writer.commit()
        return TraceDataset(run)

    return make


@pytest.fixture(scope="session")
def dataset(make_traces: Callable[..., TraceDataset]) -> TraceDataset:
    return make_traces()
