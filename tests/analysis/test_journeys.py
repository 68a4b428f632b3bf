"""The sample of journeys, the guesses in it, and the way into the page and back."""

import base64
import gzip
from collections import Counter

import numpy as np
import pytest

import analysis.journeys as token_journeys
from analysis.journeys import choose_sequences, encode, fit, make_journeys, weight_scale
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


def test_journeys_that_take_too_much_room_have_coarser_weights_then_fewer_tokens(
    dataset: TraceDataset, predictors: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    journeys = make_journeys(dataset, choose_sequences(dataset.index, 6), predictors)
    experts, scale = dataset.spec.num_experts, weight_scale(journeys)
    whole = fit(journeys, experts, scale)
    assert (whole.journeys, whole.cut, whole.coarse) == (journeys, False, False)
    monkeypatch.setattr(token_journeys, "FEW_SEQUENCES", 1)

    def size(encoded: list[dict[str, object]]) -> int:
        return sum(len(str(each["packed"])) + len("".join(each["tokens"])) for each in encoded)  # type: ignore[arg-type]

    monkeypatch.setattr(token_journeys, "SEQUENCE_BYTES", (size(whole.encoded) - 1) // 6)
    coarse = fit(journeys, experts, scale)
    assert (coarse.cut, coarse.coarse) == (False, True)
    assert size(coarse.encoded) < size(whole.encoded)
    data = gzip.decompress(base64.b64decode(coarse.encoded[0]["packed"]))
    weights = np.frombuffer(data, dtype=np.uint8).reshape(4, *journeys[0].expert_ids_TLK.shape)[1]
    assert set(np.unique(weights % 5)) == {0}
    np.testing.assert_allclose(weights / 255 * scale, journeys[0].routing_weights_TLK, atol=3.5 / 255 * scale)  # type: ignore[arg-type]

    monkeypatch.setattr(token_journeys, "LEAST_TOKENS", 4)
    monkeypatch.setattr(token_journeys, "SEQUENCE_BYTES", size(coarse.encoded) * 2 // 3 // 6)
    cut = fit(journeys, experts, scale)
    assert size(cut.encoded) <= size(coarse.encoded) * 2 / 3
    assert cut.cut
    assert max(len(journey.tokens_T) for journey in cut.journeys) == cut.tokens < 29
    for journey, before in zip(cut.journeys, journeys, strict=True):
        shown = min(cut.tokens, len(before.tokens_T))
        assert journey.tokens_T == before.tokens_T[:shown]
        np.testing.assert_array_equal(journey.guesses["markov"], before.guesses["markov"][:shown])

    monkeypatch.setattr(token_journeys, "SEQUENCE_BYTES", 1)
    assert fit(journeys, experts, scale).tokens == 4
    assert fit([], experts, scale).encoded == []
