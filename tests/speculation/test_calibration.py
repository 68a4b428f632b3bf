import numpy as np
import pytest
import torch

from speculation.calibration import BINS, PlattScaling, ReliabilityTally, softmax_log_odds
from speculation.features import RoutingBatch


def cases(probability: torch.Tensor, generator: torch.Generator, lengths: list[int]) -> RoutingBatch:
    """A batch whose one layer's set of size 1 is drawn from the probabilities of two experts."""
    second = torch.rand(len(probability), generator=generator) < probability
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    return RoutingBatch(second.long()[:, None, None], None, None, None, None, offsets, 2)


def both(probability: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - probability, probability], dim=1)[:, None]


def test_true_probabilities_have_no_calibration_error_and_distorted_ones_have_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(20_000, generator=generator) * 0.98 + 0.01
    batch = cases(probability, generator, [500] * 40)
    honest, boastful = ReliabilityTally(), ReliabilityTally()
    honest.add(both(probability), batch)
    distorted = both(torch.where(probability > 0.5, 0.99, 0.01))
    boastful.add(distorted, batch)
    found = honest.result()
    assert found["expected_calibration_error"]["value"] < 0.01
    assert found["expected_calibration_error"]["low"] <= found["expected_calibration_error"]["high"]
    assert len(found["bins"]) == BINS
    counts = [each["count"] for each in found["bins"]]
    assert sum(counts) == 40_000
    assert max(counts) < 2 * min(counts)
    for each in found["bins"]:
        assert each["observed"] == pytest.approx(each["predicted"], abs=0.05)
    assert boastful.result()["expected_calibration_error"]["value"] == pytest.approx(0.24, abs=0.02)


def test_a_tally_of_parts_equals_that_of_the_whole_and_bootstrap_repeats() -> None:
    generator = torch.Generator().manual_seed(1)
    probability = torch.rand(300, generator=generator)
    whole, parts = ReliabilityTally(), ReliabilityTally()
    batch = cases(probability, generator, [100, 200])
    whole.add(both(probability), batch)
    for start, stop in ((0, 100), (100, 300)):
        part = RoutingBatch(
            batch.expert_ids_TLK[start:stop], None, None, None, None, torch.tensor([0, stop - start]), 2
        )
        parts.add(both(probability)[start:stop], part)
    assert whole.result(resamples=50) == parts.result(resamples=50)
    with pytest.raises(ValueError, match="no case"):
        ReliabilityTally().result()


def test_platt_scaling_makes_scores_honest_without_changing_their_order() -> None:
    generator = torch.Generator().manual_seed(2)
    probability = torch.rand(6000, generator=generator) * 0.9 + 0.05
    batch = cases(probability, generator, [6000])
    scores = 5 * both(probability).log() + 3  # five times too sure
    odds = softmax_log_odds(scores)
    scaling = PlattScaling.fit(odds, batch.expert_ids_TLK)
    found = scaling.probabilities(odds)
    before, after = ReliabilityTally(), ReliabilityTally()
    before.add(scores.softmax(dim=2), batch)
    after.add(found, batch)
    errors = [tally.result(resamples=0)["expected_calibration_error"]["value"] for tally in (before, after)]
    assert errors[1] < 0.02
    assert errors[0] > 0.1
    assert torch.equal(found.argsort(dim=2), scores.argsort(dim=2))
