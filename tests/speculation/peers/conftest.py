"""Trace folders of routing that a test plants itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter

Plant = Callable[..., TraceDataset]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Writes sequences given by their expert ids (T, L, K), with whatever else is wanted."""

    def write(
        expert_ids: Sequence[np.ndarray],
        num_experts: int,
        *,
        token_ids: Sequence[np.ndarray] | None = None,
        lookahead: Sequence[np.ndarray] | None = None,
        strings: bool = True,
    ) -> TraceDataset:
        _, layers, top_k = expert_ids[0].shape
        spec = TraceSpec(
            model_name="planted",
            num_layers=layers,
            num_experts=num_experts,
            top_k=top_k,
            moe_layers=tuple(range(layers)),
            expert_order="unknown",
            quantization="none",
            model_dtype="float32",
            router_dtype="float32",
            plan_fingerprint="planted",
            store=() if lookahead is None else ("lookahead",),
            horizons=0 if lookahead is None else lookahead[0].shape[1],
        )
        planned = PlannedShard(0, 0, len(expert_ids), sum(map(len, expert_ids)))
        with ShardWriter(tmp_path / "run", spec, planned) as writer:
            for number, ids_TLK in enumerate(expert_ids):
                unknown_T = np.full(len(ids_TLK), -1)
                writer.write(
                    SequenceTrace(
                        dataset="planted",
                        sequence_id=number,
                        sequence_key=f"text-{number}",
                        token_ids_T=(unknown_T if token_ids is None else token_ids[number]).astype(np.int32),
                        tokens_T=[f"{number}" if strings else ""] * len(ids_TLK),  # without ids, they decide the split
                        phase_T=np.zeros(len(ids_TLK), dtype=np.uint8),
                        expert_ids_TLK=ids_TLK.astype(spec.id_dtype),
                        lookahead_logits_THLE=None if lookahead is None else lookahead[number].astype(np.float16),
                    )
                )
            writer.commit()
        return TraceDataset(tmp_path / "run")

    return write
