import pytest

from groundwork.errors import ConfigurationError
from speculation.counted import count_routing
from speculation.training.view import TrainingView
from traces.reader import TraceDataset


def ids(dataset: TraceDataset, split: str) -> set[int]:
    return {trace.sequence_id for trace in dataset.sequences(split, columns=())}


def test_a_limit_keeps_a_part_of_what_a_larger_one_keeps_and_all_of_validation(dataset: TraceDataset) -> None:
    small, large = (TrainingView(dataset, train_tokens=tokens, seed=1) for tokens in (150, 600))
    assert ids(small, "train") < ids(large, "train") < ids(dataset, "train")
    assert ids(small, "validation") == ids(dataset, "validation")
    for view, wanted in ((small, 150), (large, 600)):
        tokens = int(count_routing(view, "train").usage_LE[0].sum()) // view.spec.top_k
        assert wanted <= tokens < wanted + 40
    assert ids(TrainingView(dataset, train_tokens=600, seed=2), "train") != ids(large, "train")


def test_held_out_and_chosen_data_sets_hold_for_every_split(dataset: TraceDataset) -> None:
    for view in (TrainingView(dataset, hold_out=("code",)), TrainingView(dataset, only=("prose",))):
        for split in ("train", "test"):
            assert {trace.dataset for trace in view.sequences(split)} == {"prose"}
    both = TrainingView(TrainingView(dataset, train_tokens=300), only=("code",))
    assert {trace.dataset for trace in both.sequences("train")} == {"code"}
    assert ids(both, "train") < ids(TrainingView(dataset, only=("code",)), "train")
    assert list(TrainingView(dataset, only=("prose",)).sequences("all", only=("code",))) == []


def test_unknown_names_and_empty_limits_are_refused(dataset: TraceDataset) -> None:
    with pytest.raises(ConfigurationError, match="'news' is not in these traces"):
        TrainingView(dataset, only=("news",)).order("train")
    with pytest.raises(ConfigurationError, match="--train_tokens 0: must be at least 1"):
        TrainingView(dataset, train_tokens=0)
