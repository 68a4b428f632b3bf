"""The predictors of gpt-oss-20b that are shipped: within their sizes, complete, and at work on that model's traces."""

import json
from pathlib import Path

import pytest
import torch

from speculation import RoutingBatch, load_predictor
from speculation.ensemble import Ensemble

from .conftest import run_command

PROJECT = Path(__file__).resolve().parents[2]
TRACES = PROJECT.parent / "shared" / "traces"
LIMITS_MIB = {"interlayer": 16, "statistics": 16, "ensemble": 24}
FOLDERS = {name: PROJECT / "models" / f"gpt-oss-20b-{name}" for name in LIMITS_MIB}


@pytest.mark.parametrize("name", list(LIMITS_MIB))
def test_a_shipped_folder_is_small_and_its_card_says_what_it_is(name: str) -> None:
    folder = FOLDERS[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LIMITS_MIB[name] * 2**20
    card = (folder / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card
    assert "GPT-OSS-MoE-ExpertFingerprinting" in card
    assert f'load_predictor("models/gpt-oss-20b-{name}")' in card


@pytest.mark.parametrize("name", list(LIMITS_MIB))
def test_it_scores_every_horizon_and_gives_probabilities(name: str) -> None:
    predictor = load_predictor(FOLDERS[name])
    ids_TLK = torch.rand(5, 24, 32, generator=torch.Generator().manual_seed(0)).topk(4).indices
    batch = RoutingBatch(ids_TLK, None, None, None, None, torch.tensor([0, 2, 5]), 32)
    for horizon in (1, 2, 3):
        scores_TLE = predictor.predict_scores(batch, horizon)
        assert scores_TLE.shape == (5, 24, 32)
        assert scores_TLE.isfinite().all()
        probabilities_TLE = predictor.probabilities(scores_TLE, horizon)
        assert probabilities_TLE is not None
        assert 0 <= probabilities_TLE.min() < probabilities_TLE.max() <= 1
        assert torch.equal(probabilities_TLE.argmax(dim=2), scores_TLE.argmax(dim=2))


def test_the_ensemble_holds_the_two_others() -> None:
    ensemble = load_predictor(FOLDERS["ensemble"])
    assert isinstance(ensemble, Ensemble)
    for member, name in zip(ensemble.members, ("interlayer", "statistics"), strict=True):
        alone = load_predictor(FOLDERS[name]).state()
        assert all(torch.equal(tensor, alone[key]) for key, tensor in member.state().items())


@pytest.mark.skipif(not TRACES.is_dir(), reason="no shared traces beside the project")
def test_evaluate_works_at_once_on_traces_of_that_model(tmp_path: Path) -> None:
    files = [
        TRACES / f"gpt-oss-20b.{name}.jsonl.gz" for name in ("tulu3_persona_if", "Polyglot-or-Not_Fact-Completion")
    ]
    made = ("--format", "requests", "--num_experts", 32, "--model_name", "gpt-oss-20b", "--phase", "decode")
    assert run_command("import", *files, *made, "--output_dir", tmp_path / "run") == 0
    folders = [option for folder in FOLDERS.values() for option in ("--predictor_dir", folder)]
    results = tmp_path / "evaluation.json"
    scored = ("--shard_dir", tmp_path / "run", "--split", "all", "--json", results)
    assert run_command("evaluate", *scored, *folders) == 0
    found = json.loads(results.read_text("utf-8"))["predictors"]
    recall = {name: found[name]["recall"]["4"]["value"] for name in (*FOLDERS, "markov")}
    # Most of these sequences were trained on, so the bound is above what is reached on unseen ones.
    assert min(recall[name] for name in FOLDERS) > 0.8 > recall["markov"]
