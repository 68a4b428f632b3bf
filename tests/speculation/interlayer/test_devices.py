"""Training in mixed precision, on a GPU too, gives a predictor that works on any device."""

import math
from typing import Any

import pytest
import torch

from speculation import RoutingBatch
from speculation.interlayer.graph import GraphedLane
from speculation.interlayer.live import InterLayerLive
from speculation.interlayer.predictor import InterLayer
from speculation.metrics import token_values
from speculation.training.loop import LoopSettings, fit_module
from speculation.training.view import TrainingView
from traces.reader import TraceDataset

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = {"hidden_size": 16, "mlp_size": 16, "copy_key_size": 8, "context_size": 16, "window": 64}


@pytest.fixture(scope="module")
def batch(dataset: TraceDataset) -> RoutingBatch:
    return RoutingBatch.from_sequences(list(dataset.sequences("test", columns=("weights",))), dataset.spec)


def trained(dataset: TraceDataset, device: str, precision: str) -> tuple[InterLayer, list[dict[str, Any]]]:
    predictor, record = InterLayer(**SMALL).to(device), []
    settings = LoopSettings(precision=precision, max_steps=60, batch_tokens=80)
    fit_module(predictor, TrainingView(dataset), settings, record=record.append)
    return predictor, record


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "bfloat16"),
        pytest.param("cuda", "bfloat16", marks=GPU),
        pytest.param("cuda", "float32", marks=GPU),
    ],
)
def test_it_learns_and_scores_alike_on_the_cpu(
    device: str, precision: str, dataset: TraceDataset, batch: RoutingBatch
) -> None:
    predictor, record = trained(dataset, device, precision)
    losses = [line["loss"] for line in record if "validation_recall" not in line]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert {each.dtype for each in predictor.network.parameters()} == {torch.float32}
    scores = predictor.predict_scores(batch)
    assert float(token_values(scores, batch, ["recall@2"])[5:, 1:].mean()) > 0.7  # a quarter would be chance
    torch.testing.assert_close(predictor.to("cpu").predict_scores(batch), scores, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_a_loaded_predictor_replays_graphs_on_a_gpu_with_the_scores_of_the_cpu(
    horizon: int, dataset: TraceDataset, batch: RoutingBatch
) -> None:
    predictor, _ = trained(dataset, "cuda", "float32")
    tokens = int(batch.offsets[1])
    state = predictor.start()
    found = []
    for token in range(tokens):
        state.begin_token()
        for ids_K, weights_K in zip(batch.expert_ids_TLK[token], batch.routing_weights_TLK[token], strict=True):
            found.append(predictor.predict_next(state, horizon))
            state.observe(ids_K.cuda(), weights_K.cuda())
    assert isinstance(state, InterLayerLive)
    lane = state.lanes[horizon]
    assert isinstance(lane, GraphedLane)
    assert len(lane.graphs) == batch.num_layers
    expected = predictor.to("cpu").predict_scores(batch, horizon)[:tokens].flatten(0, 1)[horizon - 1 :]
    torch.testing.assert_close(torch.stack(found)[: len(expected)], expected, atol=1e-3, rtol=1e-3)
