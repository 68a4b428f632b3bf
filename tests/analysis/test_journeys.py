"""The sample of journeys, the guesses in it, and the way into the page and back."""

import base64
import gzip
from collections import Counter

import numpy as np

from analysis.journeys import choose_sequences, encode, make_journeys, weight_scale
from speculation.features import RoutingBatch
from speculation.predictor import Predictor
from traces.reader import TraceDataset


def test_the_sample_is_even_over_data_sets_prefers_the_test_split_and_follows_the_seed(dataset: TraceDataset) -> None:
    chosen = choose_sequences(dataset.index, 6, seed=3)
    assert Counter(info.dataset for info in chosen) == dict.fromkeys(dataset.datasets, 2)
    assert chosen == choose_sequences(dataset.index, 6, seed=3)
    for name in dataset.datasets:
        tests = sum(info.dataset == name and info.split == "test" for info in dataset.index)
        assert sum(info.dataset == name and info.split == "test" for info in chosen) == min(2, tests)
    assert len(choose_sequences(dataset.index, 10_000)) == dataset.num_sequences
    assert choose_sequences(dataset.index, 0) == []


def test_guesses_are_the_predictors_best_and_the_packed_arrays_decode_to_the_traces(
    dataset: TraceDataset, predictors: dict[str, Predictor]
) -> None:
    chosen = choose_sequences(dataset.index, 4)
    journeys = make_journeys(dataset, chosen, predictors)
    scale = weight_scale(journeys)
    top_k = dataset.spec.top_k
    for info, journey in zip(chosen, journeys, strict=True):
        (trace,) = dataset.read([info.sequence_id])
        scores = predictors["markov"].predict_scores(RoutingBatch.from_sequences([trace], dataset.spec))
        np.testing.assert_array_equal(journey.guesses["markov"], scores.topk(top_k).indices.numpy())
        data = gzip.decompress(base64.b64decode(encode(journey, dataset.spec.num_experts, scale)["packed"]))
        parts = np.frombuffer(data, dtype=np.uint8).reshape(4, *trace.expert_ids_TLK.shape)
        np.testing.assert_array_equal(parts[0], trace.expert_ids_TLK)
        assert trace.routing_weights_TLK is not None
        np.testing.assert_allclose(parts[1] / 255 * scale, trace.routing_weights_TLK, atol=scale / 255)
        np.testing.assert_array_equal(parts[2], journey.guesses["markov"])
        np.testing.assert_array_equal(parts[3], journey.guesses["repeat"])
