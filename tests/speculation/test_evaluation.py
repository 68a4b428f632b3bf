import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.errors import ConfigurationError
from speculation import Predictor, RoutingBatch, create, evaluate, format_table, load_predictor
from speculation.features import multi_hot
from speculation.training.trainer import TrainSettings, train
from traces.reader import TraceDataset


class Oracle(Predictor):
    """Knows the answer."""

    name = "oracle"

    def fit(self, dataset: TraceDataset, **_: Any) -> "Oracle":
        return self

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        place = torch.arange(batch.expert_ids_TLK.shape[2], 0, -1.0).expand(batch.expert_ids_TLK.shape)
        return multi_hot(batch.expert_ids_TLK, batch.num_experts).scatter(2, batch.expert_ids_TLK, place)


@pytest.fixture(scope="module")
def result(dataset: TraceDataset) -> dict[str, Any]:
    lookahead = create("gate_lookahead").fit(dataset)
    return evaluate(dataset, {"oracle": Oracle(), "gate_lookahead": lookahead}, bootstrap=100)


def test_the_result_has_the_documented_keys_and_is_json(result: dict[str, Any], dataset: TraceDataset) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["format_version"] == 1
    assert (result["num_layers"], result["num_experts"], result["top_k"], result["horizon"]) == (4, 8, 2, 1)
    test = [info for info in dataset.index if info.split == "test"]
    assert (result["sequences"], result["tokens"]) == (len(test), sum(info.num_tokens for info in test))
    assert list(result["predictors"]) == ["oracle", "gate_lookahead", "chance", "frequency", "repeat", "markov"]
    for figures in result["predictors"].values():
        assert set(figures) >= {"sees", "all_layers", "by_layer", "by_dataset"}
        for part in (figures, figures["all_layers"], *figures["by_layer"], *figures["by_dataset"].values()):
            assert list(part["top_n_accuracy"]) == ["1", "3", "5"]
            assert list(part["recall"]) == ["2", "3", "4"]
            for metric in ("hit_at_1", "exact_set", "any_hit"):
                assert part[metric]["low"] <= part[metric]["value"] <= part[metric]["high"]
        assert [layer["layer"] for layer in figures["by_layer"]] == [0, 1, 2, 3]
        assert set(figures["by_dataset"]) <= {"prose", "code"}
    assert result["predictors"]["gate_lookahead"]["sees"] == ["ids", "lookahead"]


def test_an_oracle_is_perfect_and_chance_is_exact(result: dict[str, Any]) -> None:
    oracle, chance = result["predictors"]["oracle"], result["predictors"]["chance"]
    assert oracle["exact_set"] == oracle["all_layers"]["top_n_accuracy"]["1"] == {"value": 1, "low": 1, "high": 1}
    assert chance["recall"]["2"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert chance["by_layer"][3]["exact_set"]["value"] == pytest.approx(1 / 28)


def test_headline_leaves_out_the_layers_without_one_below(dataset: TraceDataset) -> None:
    found = evaluate(dataset, {}, horizon=2, bootstrap=10)["predictors"]["markov"]
    by_layer = [layer["recall"]["2"]["value"] for layer in found["by_layer"]]
    assert found["recall"]["2"]["value"] == pytest.approx(sum(by_layer[2:]) / 2)
    assert found["all_layers"]["recall"]["2"]["value"] == pytest.approx(sum(by_layer) / 4)


def test_differences_are_paired_and_of_every_given_predictor_to_every_other(result: dict[str, Any]) -> None:
    pairs = {(each["a"], each["b"]): each for each in result["differences"]}
    others = {"oracle", "gate_lookahead", "chance", "frequency", "repeat", "markov"}
    assert set(pairs) == {(a, b) for a in ("oracle", "gate_lookahead") for b in others if a != b}
    for (a, b), each in pairs.items():
        values = [result["predictors"][name]["recall"]["2"]["value"] for name in (a, b)]
        assert each["metric"] == "recall@2"
        assert each["value"] == pytest.approx(values[0] - values[1])
    there, back = pairs["oracle", "gate_lookahead"], pairs["gate_lookahead", "oracle"]
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    beaten = next(line for line in format_table(result).splitlines() if line.startswith("oracle is better than"))
    assert all(name in beaten for name in others - {"oracle"})


def test_figures_by_position_average_to_the_headline(dataset: TraceDataset) -> None:
    result = evaluate(dataset, {}, bootstrap=10)
    ranges = result["predictors"]["repeat"]["by_position"]
    assert [(each["first"], each["last"]) for each in ranges] == [(0, 0), (1, 3), (4, 15), (16, 63)]
    tokens = [each["tokens"] for each in ranges]
    assert sum(tokens) == result["tokens"]
    mean = sum(each["recall@2"]["value"] * count for each, count in zip(ranges, tokens, strict=True)) / sum(tokens)
    assert mean == pytest.approx(result["predictors"]["repeat"]["recall"]["2"]["value"])
    assert ranges[0]["recall@2"]["value"] < ranges[2]["recall@2"]["value"]  # the first token has none before it


def test_one_data_set_can_be_scored_alone(dataset: TraceDataset) -> None:
    everything, alone = (evaluate(dataset, {}, bootstrap=10, only=only) for only in ((), ("code",)))
    assert alone["sequences"] == everything["predictors"]["markov"]["by_dataset"]["code"]["sequences"]
    assert alone["predictors"]["markov"]["recall"] == everything["predictors"]["markov"]["by_dataset"]["code"]["recall"]
    assert alone["only_dataset"] == ["code"]


def test_trained_predictors_are_calibrated_and_scored_for_it(make_traces: Any, tmp_path: Path) -> None:
    run_dir = make_traces(sequences=160)
    dataset = TraceDataset(run_dir)
    given = load_predictor(train(TrainSettings(run_dir, "markov", tmp_path / "m")))
    assert set(given.calibration_) == {1, 2, 3}
    found = evaluate(dataset, {"markov": given}, bootstrap=20)["predictors"]
    error = found["markov"]["calibration"]["expected_calibration_error"]
    assert 0 <= error["low"] <= error["value"] <= error["high"] < 0.1
    tokens = sum(each["count"] for each in found["markov"]["calibration"]["by_probability"])
    assert tokens == sum(each["count"] for each in found["markov"]["calibration"]["bins"])
    assert found["repeat"]["calibration"] is None


def test_equal_calls_give_equal_results(dataset: TraceDataset) -> None:
    assert evaluate(dataset, {}, bootstrap=20, seed=3) == evaluate(dataset, {}, bootstrap=20, seed=3)


def test_with_split_all_counts_come_from_predictor_folders_or_are_left_out(
    dataset: TraceDataset, run_dir: Path, tmp_path: Path
) -> None:
    folder = train(TrainSettings(run_dir, "markov", tmp_path / "markov"))
    found = evaluate(dataset, {"markov": load_predictor(folder)}, split="all", bootstrap=10)
    assert list(found["predictors"]) == ["markov", "chance", "frequency", "repeat"]
    assert found["sequences"] == dataset.num_sequences
    without = evaluate(dataset, {}, split="all", bootstrap=10)
    assert list(without["predictors"]) == ["chance", "repeat"]
    assert any("left out" in note for note in without["notes"])
    assert "note: frequency and markov are left out" in format_table(without)


def test_baselines_are_fitted_without_the_data_set_that_a_predictor_was_trained_without(
    dataset: TraceDataset, run_dir: Path, tmp_path: Path
) -> None:
    settings = TrainSettings(run_dir, "frequency", tmp_path / "f", hold_out_dataset=("code",))
    given = load_predictor(train(settings))
    found = evaluate(dataset, {"frequency@f": given}, bootstrap=10)
    assert found["predictors"]["frequency@f"]["recall"] == found["predictors"]["frequency"]["recall"]
    assert any("without code" in note for note in found["notes"])


def test_without_a_known_order_the_first_choice_is_not_scored(make_traces: Any) -> None:
    found = evaluate(TraceDataset(make_traces(sequences=40, store=(), order="unknown")), {}, split="all", bootstrap=10)
    assert found["predictors"]["repeat"]["top_n_accuracy"] is None
    assert found["predictors"]["chance"]["by_layer"][0]["top_n_accuracy"] is None
    assert "hit@1" in format_table(found)


def test_what_can_not_be_evaluated_is_refused(dataset: TraceDataset, make_traces: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"--horizon 4: .* 1 to 3 layers ahead"):
        evaluate(dataset, {}, horizon=4)
    with pytest.raises(ConfigurationError, match="--split tset: unknown"):
        evaluate(dataset, {}, split="tset")
    bare = TraceDataset(make_traces(sequences=8, experts=10, store=()))
    with pytest.raises(ConfigurationError, match=r"top 2 of 10 experts, but predictor markov was fitted for .* of 8"):
        evaluate(bare, {"markov": create("markov").fit(dataset)})
    with pytest.raises(ConfigurationError, match=r"gate_lookahead requires the column 'lookahead'.*--store"):
        evaluate(bare, {"gate_lookahead": create("gate_lookahead")})
