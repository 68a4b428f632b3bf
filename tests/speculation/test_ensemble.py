from pathlib import Path

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import RoutingBatch, create, load_predictor
from speculation.calibration import ReliabilityTally
from speculation.ensemble import Ensemble
from speculation.metrics import token_values
from speculation.predictor import CONFIG_FILE, MODEL_FILE
from traces.reader import TraceDataset


@pytest.fixture(scope="module")
def members(dataset: TraceDataset, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that knows the layer below, one that knows the sequence, and a network."""
    root = tmp_path_factory.mktemp("members")
    for name in ("markov", "repeat"):
        create(name).fit(dataset).save_pretrained(root / name)
    create("interlayer").fit(dataset, max_steps=2).save_pretrained(root / "interlayer")
    return [root / name for name in ("markov", "repeat", "interlayer")]


@pytest.fixture(scope="module")
def batch(dataset: TraceDataset) -> RoutingBatch:
    stream = dataset.sequences("test", columns=("weights", "tokens"))
    return RoutingBatch.from_sequences(list(stream), dataset.spec)


def recall(scores: torch.Tensor, batch: RoutingBatch) -> float:
    return float(token_values(scores, batch, ["recall@2"])[:, 1:].mean())


def test_members_that_know_different_things_are_better_together(
    members: list[Path], dataset: TraceDataset, batch: RoutingBatch
) -> None:
    stacked = Ensemble(members[:2]).fit(dataset, split="validation")
    best = max(recall(load_predictor(member).predict_scores(batch), batch) for member in members[:2])
    assert recall(stacked.predict_scores(batch), batch) > best + 0.01


def test_it_is_saved_whole_and_comes_back_equal_when_its_members_are_gone(
    members: list[Path], dataset: TraceDataset, batch: RoutingBatch, tmp_path: Path
) -> None:
    stacked = Ensemble([str(member) for member in members]).fit(dataset, split="validation")
    assert stacked.sees(dataset.available) == ["ids", "weights"]
    stacked.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, MODEL_FILE}
    assert str(members[0].parent) not in (tmp_path / CONFIG_FILE).read_text()
    loaded = load_predictor(tmp_path)
    assert isinstance(loaded, Ensemble)
    assert loaded.requires == stacked.requires
    for horizon in (1, 2, 3):
        scores = stacked.predict_scores(batch, horizon)
        assert torch.equal(loaded.predict_scores(batch, horizon), scores)
        assert torch.equal(loaded.set_confidence(scores, horizon), stacked.set_confidence(scores, horizon))


def test_its_confidence_is_calibrated_for_experts_and_for_sets(dataset: TraceDataset, batch: RoutingBatch) -> None:
    stacked = Ensemble().fit(dataset, split="validation")
    assert [member.name for member in stacked.members] == ["statistics", "markov"]
    scores = stacked.predict_scores(batch)
    tally = ReliabilityTally()
    tally.add(stacked.probabilities(scores), batch)
    assert tally.result(bins=5, resamples=0)["expected_calibration_error"]["value"] < 0.05
    exact = token_values(scores, batch, ["exact_set"])[..., 0]
    assert float(stacked.set_confidence(scores).mean()) == pytest.approx(float(exact.mean()), abs=0.1)
    sure = stacked.set_confidence(scores) > stacked.set_confidence(scores).median()
    assert float(exact[sure].mean()) > float(exact[~sure].mean())


def test_what_a_member_requires_the_ensemble_requires(dataset: TraceDataset, tmp_path: Path) -> None:
    create("gate_lookahead").fit(dataset).save_pretrained(tmp_path / "gate")
    create("markov").fit(dataset).save_pretrained(tmp_path / "markov")
    stacked = Ensemble([tmp_path / "gate", tmp_path / "markov"])
    assert stacked.requires == {"ids", "lookahead"}
    assert create("markov").requires == {"ids"}


def test_members_of_another_model_and_empty_splits_are_refused(
    members: list[Path], dataset: TraceDataset, make_traces: object
) -> None:
    other = TraceDataset(make_traces(sequences=20, experts=10))  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="fitted for"):
        Ensemble(members).fit(other)
    with pytest.raises(ConfigurationError, match="holds no sequence to fit on"):
        Ensemble(members).fit(dataset, hold_out=dataset.datasets)
    with pytest.raises(ConfigurationError, match="no predictor folder"):
        Ensemble(["nowhere"])
