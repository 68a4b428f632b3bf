"""Small trace folders for the tests of `traces`: specs, random but valid sequences, and whole runs."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from traces.card import write_card
from traces.plan import SEQUENCES_SCHEMA, Plan, PlannedShard
from traces.run_folder import begin, writing
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter


def _make_spec(**changes: Any) -> TraceSpec:
    values: dict[str, Any] = {
        "model_name": "random-mixtral",
        "model_revision": None,
        "num_layers": 3,
        "num_experts": 8,
        "top_k": 2,
        "moe_layers": None,
        "expert_order": "weight",
        "weights_normalized": True,
        "quantization": "none",
        "model_dtype": "float32",
        "router_dtype": "float32",
        "attn_implementation": "sdpa",
        "experts_implementation": "eager",
        "library_versions": {"torch": "2.13.0"},
        "tokenizer_hash": "0" * 16,
        "seed": 0,
        "plan_fingerprint": "f" * 32,
        "store": ("weights",),
        "horizons": 0,
    }
    values |= changes
    values["moe_layers"] = values["moe_layers"] or tuple(range(values["num_layers"]))
    return TraceSpec(**values)


def _make_sequences(spec: TraceSpec, lengths: Sequence[int], seed: int = 0) -> list[SequenceTrace]:
    generator = np.random.default_rng(seed)
    layers, experts, top_k = spec.num_layers, spec.num_experts, spec.top_k
    sequences = []
    for number, tokens in enumerate(lengths):
        logits = generator.normal(size=(tokens, layers, experts)).astype(np.float16)
        ids = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
        weights = np.exp(np.take_along_axis(logits, ids, -1).astype(np.float32))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float16)
        lookahead = generator.normal(size=(tokens, spec.horizons, layers, experts)).astype(np.float16)
        for h in range(1, spec.horizons + 1):
            lookahead[:, h - 1, :h] = 0
        token_ids = generator.integers(0, 1000, tokens).astype(np.int32)
        sequences.append(
            SequenceTrace(
                dataset=("books", "code", "news")[number % 3],
                sequence_id=number,
                sequence_key=f"row-{number}",
                token_ids_T=token_ids,
                tokens_T=[f"<{token}>" for token in token_ids],
                phase_T=np.zeros(tokens, np.uint8),
                expert_ids_TLK=ids.astype(spec.id_dtype),
                routing_weights_TLK=weights if "weights" in spec.store else None,
                router_logits_TLE=logits if "logits" in spec.store else None,
                lookahead_logits_THLE=lookahead if "lookahead" in spec.store else None,
            )
        )
    return sequences


def _make_plan(spec: TraceSpec, sequences: Sequence[SequenceTrace], shards: int = 1) -> Plan:
    bounds = np.linspace(0, len(sequences), shards + 1).astype(int).tolist()
    planned = [
        PlannedShard(i, first, stop, sum(s.num_tokens for s in sequences[first:stop]))
        for i, (first, stop) in enumerate(pairwise(bounds))
    ]
    table = pa.table(
        [
            pa.array([s.sequence_id for s in sequences], pa.uint32()),
            pa.array([s.dataset for s in sequences]),
            pa.array([s.sequence_key for s in sequences]),
            pa.array(range(len(sequences)), pa.int64()),
            pa.array([s.num_tokens for s in sequences], pa.int32()),
            pa.array([i for i, p in enumerate(planned) for _ in range(p.first_sequence, p.stop_sequence)], pa.int32()),
            pa.array([0] * len(sequences), pa.int32()),
        ],
        schema=SEQUENCES_SCHEMA,
    )
    return Plan(spec.plan_fingerprint, spec, {"seed": 0}, [{"name": "made up"}], planned, table)


def _write_run(
    run_dir: Path, spec: TraceSpec, sequences: Sequence[SequenceTrace], shards: int = 1, row_group_tokens: int = 65536
) -> Plan:
    plan = _make_plan(spec, sequences, shards)
    with writing(run_dir):
        plan, finished = begin(run_dir, plan, resume=True)
        for planned in plan.shards:
            if planned.index not in finished:
                with ShardWriter(run_dir, spec, planned, row_group_tokens=row_group_tokens) as writer:
                    for sequence in sequences[planned.first_sequence : planned.stop_sequence]:
                        writer.write(sequence)
                    writer.commit()
        write_card(run_dir)
    return plan


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., TraceSpec]:
    """Return a function that makes a spec of 3 layers, top 2 of 8 experts, with changes."""
    return _make_spec


@pytest.fixture(scope="session")
def make_sequences() -> Callable[..., list[SequenceTrace]]:
    """Return a function that makes random sequences of given lengths for a spec."""
    return _make_sequences


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """Return a function that plans sequences into shards of equal count."""
    return _make_plan


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Plan]:
    """Return a function that writes a run folder whole, or what is missing of it: plan, shards, manifest, card."""
    return _write_run
