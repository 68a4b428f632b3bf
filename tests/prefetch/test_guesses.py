"""What prefetchers believe: a predictor's own scores and probabilities, the truth, and made-up guesses between."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from prefetch import guesses as guesses_module
from prefetch.guesses import GradedGuesses, Guesses, no_guesses, perfect_guesses, predictor_guesses
from prefetch.workload import Workload, read_workload
from speculation import Predictor, RoutingBatch, create
from speculation.calibration import PlattScaling
from traces.reader import TraceDataset

Make = Callable[..., Workload]


@pytest.fixture(scope="module")
def markov(dataset: TraceDataset) -> Predictor:
    return create("markov").fit(dataset)


def scores_of(dataset: TraceDataset, predictor: Predictor, horizon: int) -> torch.Tensor:
    batch = RoutingBatch.from_sequences(list(dataset.sequences("test", ())), dataset.spec)
    return predictor.predict_scores(batch, horizon)


@pytest.mark.parametrize("horizon", [1, 3])
def test_guesses_are_the_best_scored_experts_best_first(dataset: TraceDataset, markov: Predictor, horizon: int) -> None:
    found = predictor_guesses(dataset, "test", (), markov, horizon, width=5)
    scores_TLE = scores_of(dataset, markov, horizon).numpy()
    assert found.ids_TLB.shape == found.p_TLB.shape == (*scores_TLE.shape[:2], 5)
    named_TLB = np.take_along_axis(scores_TLE, found.ids_TLB.astype(np.int64), axis=2)
    np.testing.assert_array_equal(named_TLB, -np.sort(-scores_TLE, axis=2)[:, :, :5])
    assert (np.diff(found.p_TLB, axis=2) <= 0).all()
    assert (np.diff(np.sort(found.ids_TLB.astype(np.int64), axis=2), axis=2) > 0).all()


def test_a_calibrated_predictor_is_taken_at_its_own_probabilities(dataset: TraceDataset, markov: Predictor) -> None:
    calibrated = create("markov").fit(dataset)
    calibrated.calibration_ = {1: PlattScaling(torch.tensor([[0.5, -1.0], [1.0, 0.0], [1.5, 0.3], [0.7, 2.0]]))}
    found = predictor_guesses(dataset, "test", (), calibrated, 1, width=8)
    p_TLE = calibrated.probabilities(scores_of(dataset, calibrated, 1), 1).numpy()
    np.testing.assert_array_equal(found.p_TLB, np.take_along_axis(p_TLE, found.ids_TLB.astype(np.int64), axis=2))
    uncalibrated = predictor_guesses(dataset, "test", (), markov, 1, width=8)
    np.testing.assert_array_equal(found.ids_TLB, uncalibrated.ids_TLB)
    assert not np.allclose(found.p_TLB, uncalibrated.p_TLB)


def test_an_uncalibrated_one_expects_each_expert_k_times_as_often_as_its_share(
    dataset: TraceDataset, markov: Predictor
) -> None:
    found = predictor_guesses(dataset, "test", (), markov, 1, width=8)
    shares_TLE = scores_of(dataset, markov, 1).numpy()  # markov's scores are shares: they sum to 1
    wanted_TLE = np.minimum(1, 2 * shares_TLE / shares_TLE.sum(axis=2, keepdims=True))
    named_TLB = np.take_along_axis(wanted_TLE, found.ids_TLB.astype(np.int64), axis=2)
    np.testing.assert_allclose(found.p_TLB, named_TLB, rtol=1e-3, atol=1e-5)


def test_guesses_do_not_depend_on_how_sequences_are_packed(
    dataset: TraceDataset, markov: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predictor_guesses(dataset, "test", (), markov, 2, width=3)
    monkeypatch.setattr(guesses_module, "BATCH_TOKENS", 20)
    pieces = predictor_guesses(dataset, "test", (), markov, 2, width=3)
    np.testing.assert_array_equal(whole.ids_TLB, pieces.ids_TLB)
    np.testing.assert_array_equal(whole.p_TLB, pieces.p_TLB)


def test_guesses_stand_beside_the_tokens_of_the_workload(dataset: TraceDataset, markov: Predictor) -> None:
    ids_TLK = read_workload(dataset, "test", ["code"]).expert_ids_TLK
    found = predictor_guesses(dataset, "test", ["code"], markov, 1, width=8)
    assert len(found.ids_TLB) == len(ids_TLK)
    assert found.recall(ids_TLK, 2) > 0.6  # chance is 0.25
    shifted = Guesses(np.roll(found.ids_TLB, 1, axis=1), found.p_TLB)
    assert shifted.recall(ids_TLK, 2) < 0.4


def test_recall_counts_what_is_named_within_the_budget() -> None:
    ids_TLK = np.array([[[0, 1]], [[2, 3]]], dtype=np.uint16)
    guesses = Guesses(
        np.array([[[1, 5, 0]], [[4, 2, 3]]], dtype=np.uint16),
        np.array([[[0.9, 0.5, 0.4]], [[0.8, 0.2, -1.0]]], dtype=np.float32),  # the last list ends after two
    )
    assert [guesses.recall(ids_TLK, budget) for budget in (1, 2, 3)] == [0.25, 0.5, 0.75]
    assert guesses.of(np.array([True, False])).recall(ids_TLK[:1], 3) == 1


def test_perfect_guesses_name_the_choice_and_no_guesses_name_none(random_workload: Make) -> None:
    workload = random_workload([9, 4])
    assert perfect_guesses(workload).recall(workload.expert_ids_TLK, 2) == 1
    assert (perfect_guesses(workload).p_TLB == 1).all()
    assert no_guesses(workload).recall(workload.expert_ids_TLK, 2) == 0


def test_made_up_guesses_are_right_at_more_visits_with_a_larger_share(random_workload: Make) -> None:
    workload = random_workload([300], layers=4, experts=16)
    graded = GradedGuesses(workload, seed=0)
    shares = np.linspace(0, 1, 9)
    named = [graded.of_share(share) for share in shares]
    recalls = [recall for _, recall in named]
    assert recalls == sorted(recalls)
    np.testing.assert_allclose(recalls, shares + (1 - shares) * 2 / 16, atol=0.03)
    assert recalls[-1] == 1
    right = [(guesses.ids_TLB == workload.expert_ids_TLK).all(axis=2) for guesses, _ in named]
    for fewer, more in pairwise(right):
        assert more[fewer].all()
    for guesses, recall in named:
        assert guesses.recall(workload.expert_ids_TLK, 2) == recall
        np.testing.assert_allclose(guesses.p_TLB, recall)


def test_made_up_guesses_name_distinct_experts_and_are_the_seed_s(random_workload: Make) -> None:
    workload = random_workload([60], experts=16, top_k=4)
    blind, again, other = (GradedGuesses(workload, seed).of_share(0.3)[0].ids_TLB for seed in (1, 1, 2))
    np.testing.assert_array_equal(blind, again)
    assert (blind != other).any()
    assert (np.diff(np.sort(blind.astype(np.int64), axis=2), axis=2) > 0).all()
