"""Agreement against sets and loops, on random routing of two runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.counts.agreement import Agreement, expected_share
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec


def routed(rng: np.random.Generator, spec: TraceSpec, tokens: int, dataset: str = "code") -> SequenceTrace:
    scores = rng.random((tokens, spec.num_layers, spec.num_experts))
    ids_TLK = np.argsort(scores, axis=-1)[..., : spec.top_k].astype(spec.id_dtype)
    weights_TLK = np.sort(rng.random(ids_TLK.shape), axis=-1)[..., ::-1].astype(np.float16)
    return SequenceTrace(
        dataset, 0, "key", np.zeros(tokens, np.int32), [""] * tokens, np.zeros(tokens, np.uint8), ids_TLK, weights_TLK
    )


def slow(first: SequenceTrace, second: SequenceTrace, fewest: int) -> dict[str, np.ndarray]:
    """Every measure of each token and layer, with sets and dictionaries."""
    values: dict[str, list[list[float]]] = {
        name: [] for name in ("shared", "exact_set", "first_choice", "weight_distance")
    }
    for token in range(first.num_tokens):
        for rows in values.values():
            rows.append([])
        for layer in range(first.expert_ids_TLK.shape[1]):
            ids = [each.expert_ids_TLK[token, layer].tolist() for each in (first, second)]
            weights = []
            for each, own in zip((first, second), ids, strict=True):
                assert each.routing_weights_TLK is not None
                weight = each.routing_weights_TLK[token, layer].astype(np.float64)
                weights.append(dict(zip(own, weight / weight.sum(), strict=True)))
            values["shared"][-1].append(len({*ids[0]} & {*ids[1]}) / fewest)
            values["exact_set"][-1].append({*ids[0]} == {*ids[1]})
            values["first_choice"][-1].append(ids[0][0] == ids[1][0])
            everyone = {*ids[0], *ids[1]}
            values["weight_distance"][-1].append(
                sum(abs(weights[0].get(expert, 0) - weights[1].get(expert, 0)) for expert in everyone) / 2
            )
    return {name: np.array(rows, dtype=np.float64) for name, rows in values.items()}


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_measures_equal_those_of_sets(dataset_spec: TraceSpec, seed: int, first_k: int, second_k: int) -> None:
    specs = [replace(dataset_spec, num_experts=6, top_k=top_k) for top_k in (first_k, second_k)]
    rng = np.random.default_rng(seed)
    measured = Agreement(*specs)
    texts = [[routed(rng, spec, tokens) for spec in specs] for tokens in (1, 5)]
    for first, second in texts:
        measured.add(first, second)
    result = measured.result(resamples=0)
    expected = [slow(first, second, min(first_k, second_k)) for first, second in texts]
    assert ("exact_set" in result) == (first_k == second_k)
    for name in measured.measures:
        by_layer = np.concatenate([values[name] for values in expected]).mean(axis=0)
        np.testing.assert_allclose([entry[name]["value"] for entry in result["by_layer"]], by_layer, atol=1e-6)
        assert result[name]["value"] == pytest.approx(by_layer.mean(), abs=1e-6)


def test_data_sets_are_kept_apart_and_intervals_hold_their_values(dataset_spec: TraceSpec) -> None:
    rng = np.random.default_rng(0)
    measured = Agreement(dataset_spec, dataset_spec)
    for _ in range(20):
        same = routed(rng, dataset_spec, 9, "same")
        measured.add(same, same)
        measured.add(routed(rng, dataset_spec, 6, "other"), routed(rng, dataset_spec, 6, "other"))
    result = measured.result(resamples=200)
    same, other = result["by_dataset"]["same"], result["by_dataset"]["other"]
    assert (same["sequences"], same["tokens"], other["tokens"]) == (20, 180, 120)
    assert same["shared"] == same["exact_set"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert same["weight_distance"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert other["shared"]["low"] < other["shared"]["value"] < other["shared"]["high"] < 0.6
    assert other["shared"]["value"] == pytest.approx(dataset_spec.top_k / dataset_spec.num_experts, abs=0.1)


def test_what_a_run_does_not_know_is_not_measured(dataset_spec: TraceSpec) -> None:
    unordered, bare = replace(dataset_spec, expert_order="unknown"), replace(dataset_spec, store=())
    assert Agreement(dataset_spec, unordered).measures == ["shared", "exact_set", "weight_distance"]
    assert Agreement(bare, dataset_spec).measures == ["shared", "exact_set", "first_choice"]
    shorter, longer = (routed(np.random.default_rng(0), dataset_spec, tokens) for tokens in (3, 4))
    with pytest.raises(ValueError, match="3 tokens against 4"):
        Agreement(dataset_spec, dataset_spec).add(shorter, longer)


def test_weights_that_are_zero_or_not_finite_leave_a_distance(dataset_spec: TraceSpec) -> None:
    trace = routed(np.random.default_rng(0), dataset_spec, 4)
    assert trace.routing_weights_TLK is not None
    odd: dict[str, Any] = {"routing_weights_TLK": np.full_like(trace.routing_weights_TLK, np.nan)}
    measured = Agreement(dataset_spec, dataset_spec)
    measured.add(trace, replace(trace, **odd))
    assert measured.result(resamples=0)["weight_distance"]["value"] == pytest.approx(0.5, abs=1e-3)


def test_choices_made_apart_share_what_is_expected(dataset_spec: TraceSpec) -> None:
    spec = replace(dataset_spec, num_experts=6)
    rng = np.random.default_rng(3)
    favoured = np.linspace(0, 1, 6)
    measured, chosen_RLE = Agreement(spec, spec), np.zeros((2, spec.num_layers, 6), dtype=np.int64)
    for _ in range(40):
        pair = [routed(rng, spec, 100) for _ in range(2)]
        for run, trace in enumerate(pair):
            scores = rng.random((*trace.expert_ids_TLK.shape[:2], 6)) + favoured
            trace.expert_ids_TLK[:] = np.argsort(-scores, axis=-1)[..., : spec.top_k]
            for layer in range(spec.num_layers):
                chosen_RLE[run, layer] += np.bincount(trace.expert_ids_TLK[:, layer].ravel(), minlength=6)
        measured.add(*pair)
    shared_L = [entry["shared"]["value"] for entry in measured.result(resamples=0)["by_layer"]]
    np.testing.assert_allclose(expected_share(chosen_RLE, 4000), shared_L, atol=0.03)


@pytest.fixture(scope="module")
def dataset_spec(dataset: TraceDataset) -> TraceSpec:
    return dataset.spec
