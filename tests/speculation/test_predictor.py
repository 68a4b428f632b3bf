import json
from pathlib import Path
from typing import Any

import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation import PREDICTORS, RoutingBatch, create, load_predictor, load_predictors
from speculation.counted import Markov
from speculation.neural import NeuralPredictor
from speculation.predictor import CONFIG_FILE, MODEL_FILE
from traces.reader import TraceDataset

# Neural predictors need weights that are not those they start from, not good ones.
FIT_LIMITS: dict[str, dict[str, Any]] = {
    name: {"max_steps": 2} for name, cls in PREDICTORS.items() if issubclass(cls, NeuralPredictor)
}


@pytest.fixture(scope="module")
def batch(dataset: TraceDataset) -> RoutingBatch:
    stream = dataset.sequences("test", columns=("weights", "logits", "lookahead", "tokens"))
    return RoutingBatch.from_sequences(list(stream), dataset.spec)


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_a_saved_predictor_comes_back_with_equal_scores_and_provenance(
    name: str, dataset: TraceDataset, batch: RoutingBatch, tmp_path: Path
) -> None:
    predictor = create(name).fit(dataset, **FIT_LIMITS.get(name, {}))
    predictor.save_pretrained(tmp_path, {"traced_model": "synthetic"})
    loaded = load_predictor(tmp_path)
    assert type(loaded) is type(predictor)
    assert loaded.provenance_ == {"traced_model": "synthetic"}
    assert loaded.folder_ == tmp_path
    for horizon in (1, 3):
        scores = loaded.predict_scores(batch, horizon)
        assert scores.shape == (batch.num_tokens, 4, 8)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, predictor.predict_scores(batch, horizon))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, MODEL_FILE}


def test_unknown_names_and_options_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"oracle: unknown; choose one of .*frequency.*interlayer"):
        create("oracle")
    with pytest.raises(ConfigurationError, match=r"options \['depth'\]"):
        create("interlayer", depth=3)


def test_a_folder_that_is_no_predictor_or_is_damaged_is_refused(dataset: TraceDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no predictor folder"):
        load_predictor(tmp_path / "missing")
    Markov().fit(dataset).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="holds a markov predictor, not frequency"):
        PREDICTORS["frequency"].from_pretrained(tmp_path)
    model = (tmp_path / MODEL_FILE).read_bytes()
    (tmp_path / MODEL_FILE).write_bytes(model[:-10])
    with pytest.raises(ConfigurationError, match=r"model.safetensors: missing or damaged"):
        load_predictor(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(model)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for broken, message in (
        ({**config, "format_version": 9}, "format_version 9"),
        ({**config, "predictor": "oracle"}, "unknown; choose"),
        ({key: value for key, value in config.items() if key != "top_k"}, "damaged predictor folder"),
        ([], "names no predictor"),
    ):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(broken))
        with pytest.raises(ConfigurationError, match=message):
            load_predictor(tmp_path)


def test_a_second_predictor_of_a_name_is_called_after_its_folder(dataset: TraceDataset, tmp_path: Path) -> None:
    for name in ("one", "two"):
        Markov().fit(dataset).save_pretrained(tmp_path / name)
    assert list(load_predictors([tmp_path / "one", tmp_path / "two"])) == ["markov", "markov@two"]
    with pytest.raises(ConfigurationError, match="'markov@two' was given before"):
        load_predictors([tmp_path / name for name in ("one", "two", "two")])


def test_a_horizon_out_of_range_is_refused(dataset: TraceDataset, batch: RoutingBatch) -> None:
    for horizon in (0, 4):
        with pytest.raises(ConfigurationError, match=f"--horizon {horizon}: must be 1 to 3"):
            Markov().fit(dataset).predict_scores(batch, horizon)
