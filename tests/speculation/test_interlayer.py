from dataclasses import replace

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, create
from speculation.counted import count_routing
from speculation.interlayer import InterLayer
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset


def test_the_loss_is_the_cross_entropy_against_the_chosen_set() -> None:
    logits = torch.tensor([[[1.0, 2.0, 0.5]]])
    expected = -logits.log_softmax(dim=2)[0, 0, [0, 2]].mean()
    torch.testing.assert_close(InterLayer().loss(logits, torch.tensor([[[2, 0]]])), expected)


def test_an_untrained_model_starts_near_the_frequencies(dataset: TraceDataset) -> None:
    counts, shape = count_routing(dataset), RoutingShape.of(dataset)
    predictor = InterLayer()
    predictor.shape_ = shape
    predictor.module_ = predictor.build(shape, torch.Generator().manual_seed(0), counts)
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    likely = predictor.predict_scores(batch).softmax(dim=2).mean(dim=0)
    torch.testing.assert_close(likely, counts.frequency_LE(), atol=0.05, rtol=0)


def test_what_it_scores_does_not_depend_on_weights_when_it_was_trained_without(dataset: TraceDataset) -> None:
    predictor = InterLayer()
    predictor.uses = frozenset()
    predictor.shape_ = RoutingShape.of(dataset)
    predictor.module_ = predictor.build(predictor.shape_, torch.Generator().manual_seed(0))
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test")), dataset.spec)
    assert batch.routing_weights_TLK is not None
    assert torch.equal(
        predictor.predict_scores(batch), predictor.predict_scores(replace(batch, routing_weights_TLK=None))
    )


@pytest.mark.parametrize(("layers", "reach"), [(1, 6), (2, 6), (4, 1)])
def test_any_number_of_layers_and_any_reach_work_at_every_horizon(layers: int, reach: int) -> None:
    shape = RoutingShape(layers, 300, 3)
    predictor = InterLayer(hidden_size=8, num_heads=2, reach=reach)
    predictor.shape_ = shape
    predictor.module_ = predictor.build(shape, torch.Generator().manual_seed(0))
    ids = torch.rand(5, layers, 300, generator=torch.Generator().manual_seed(0)).argsort(dim=2)[:, :, :3]
    batch = RoutingBatch(ids, None, None, None, None, torch.tensor([0, 5]), 300)
    for horizon in range(1, min(3, layers) + 1):
        assert predictor.predict_scores(batch, horizon).shape == (5, layers, 300)


def test_a_hidden_size_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hidden_size 10 is no multiple of num_heads 4"):
        create("interlayer", hidden_size=10)
