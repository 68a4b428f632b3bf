"""A small trace folder whose data sets prefer different experts, with token text that tries to break out of a page."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundwork.profiles.loading import hardware_profile
from groundwork.profiles.model import ModelProfile
from prefetch.settings import SimulateSettings
from prefetch.simulate import simulate
from speculation.evaluation import evaluate
from speculation.predictor import Predictor, create
from traces.plan import PlannedShard
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec
from traces.writer import ShardWriter

HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked=1</script>",
    "<img src=x onerror=document.documentElement.dataset.hacked=2>",
    '"><a href="https://example.com">link</a>',
    "&lt;b&gt;",
    "a\u202eb\u2066c",
    "\x00\x07\x1b[31m",
    "\u200b",
    "e" + "\u0301" * 12,
    "\n",
    "{{ 7 * 7 }}",
    "<svg/onload=document.documentElement.dataset.hacked=3>",
    "<a href='javascript:document.documentElement.dataset.hacked=4'>link</a>",
    "<!--",
)
HOSTILE_DATASET = "<a href='https://example.com'>prose</a>"
HOSTILE_MODEL = "tiny</title><b>mixtral"
HOSTILE_MACHINE = "a <img src=x onerror=document.documentElement.dataset.hacked=7> machine"

MakeRun = Callable[..., Path]


def make_sequences(
    spec: TraceSpec,
    lengths: list[int],
    datasets: tuple[str, ...],
    seed: int = 0,
    texts: tuple[str, ...] = HOSTILE,
    key: str = "text",
) -> list[SequenceTrace]:
    """Random routing in which data set d favours expert d of every layer; tokens go round `texts`."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number, tokens in enumerate(lengths):
        which = number % len(datasets)
        scores = rng.normal(size=(tokens, spec.num_layers, spec.num_experts))
        scores[:, :, which % spec.num_experts] += 1.0
        ids = np.argsort(-scores, axis=-1)[..., : spec.top_k]
        weights = np.sort(rng.random(ids.shape) + 0.1, axis=-1)[..., ::-1]
        weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float16)
        sequences.append(
            SequenceTrace(
                dataset=datasets[which],
                sequence_id=number,
                sequence_key=f"{key}-{number}",
                token_ids_T=rng.integers(0, 1000, tokens).astype(np.int32),
                tokens_T=[texts[place % len(texts)] for place in range(tokens)],
                phase_T=np.zeros(tokens, dtype=np.uint8),
                expert_ids_TLK=ids.astype(spec.id_dtype),
                routing_weights_TLK=weights if "weights" in spec.store else None,
            )
        )
    return sequences


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Returns a function that writes a trace folder of one shard."""

    def make(
        *,
        sequences: int = 60,
        layers: int = 3,
        experts: int = 8,
        top_k: int = 2,
        datasets: tuple[str, ...] = (HOSTILE_DATASET, "code", "tables"),
        store: tuple[str, ...] = ("weights",),
        order: str = "weight",
        tokens: tuple[int, int] = (9, 30),
        texts: tuple[str, ...] = HOSTILE,
        key: str = "text",
        model: str = HOSTILE_MODEL,
    ) -> Path:
        run = tmp_path_factory.mktemp("run")
        spec = TraceSpec(
            model_name=model,
            model_revision=None,
            num_layers=layers,
            num_experts=experts,
            top_k=top_k,
            moe_layers=tuple(range(1, layers + 1)),
            expert_order=order,
            weights_normalized=True if "weights" in store else None,
            quantization="none",
            model_dtype="float32",
            router_dtype="float32",
            attn_implementation=None,
            experts_implementation=None,
            library_versions={"torch": "2"},
            tokenizer_hash=None,
            seed=0,
            plan_fingerprint="made up",
            store=store,
        )
        lengths = np.random.default_rng(1).integers(*tokens, sequences).tolist()
        planned = PlannedShard(0, 0, sequences, sum(lengths))
        with ShardWriter(run, spec, planned) as writer:
            for sequence in make_sequences(spec, lengths, datasets, texts=texts, key=key):
                writer.write(sequence)
            writer.commit()
        return run

    return make


@pytest.fixture(scope="session")
def write_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TraceSpec, list[SequenceTrace]], TraceDataset]:
    """Returns a function that writes sequences, numbered anew, as a trace folder of one shard."""

    def write(spec: TraceSpec, sequences: list[SequenceTrace]) -> TraceDataset:
        run = tmp_path_factory.mktemp("written")
        planned = PlannedShard(0, 0, len(sequences), sum(sequence.num_tokens for sequence in sequences))
        with ShardWriter(run, spec, planned) as writer:
            for number, sequence in enumerate(sequences):
                writer.write(replace(sequence, sequence_id=number))
            writer.commit()
        return TraceDataset(run)

    return write


@pytest.fixture(scope="session")
def dataset(make_run: MakeRun) -> TraceDataset:
    return TraceDataset(make_run())


@pytest.fixture(scope="session")
def predictors(dataset: TraceDataset) -> dict[str, Predictor]:
    return {name: create(name).fit(dataset) for name in ("markov", "repeat")}


@pytest.fixture(scope="session")
def evaluation(dataset: TraceDataset, predictors: dict[str, Predictor]) -> dict[str, Any]:
    return evaluate(dataset, {"markov@<b>mine": predictors["markov"]}, bootstrap=50)


@pytest.fixture(scope="session")
def simulation(dataset: TraceDataset, predictors: dict[str, Predictor]) -> dict[str, Any]:
    """What `simulate` says of a laptop that holds half of the experts, as it comes back from its file."""
    spec = dataset.spec
    model = ModelProfile(
        "tiny", "made up", spec.num_layers, spec.num_experts, spec.top_k, expert_parameters=6_600_000,
        layer_parameters=1_000_000, other_parameters=2_000_000, embedding_parameters=1_000_000,
        precisions={"bf16": 2.0}, default_precision="bf16",
    )  # fmt: skip
    settings = SimulateSettings(cache_experts="50%", prediction_us="20", sweep_tokens=60, bootstrap=50)
    machine = replace(hardware_profile("laptop"), name=HOSTILE_MACHINE)
    result = simulate(dataset, {"markov@<b>mine": predictors["markov"]}, model, machine, settings)
    return dict(json.loads(json.dumps(result)))
