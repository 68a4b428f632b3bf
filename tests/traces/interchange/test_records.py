"""Records of one token and layer each: sequences are put together from any order, and kept only without a hole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.interchange.records import RecordsSource
from traces.interchange.settings import ImportSettings


@pytest.fixture(scope="module")
def records_of(routing):
    """Return a function that makes one sequence's records, token after token."""

    def make(
        problem: int | str = 0, tokens: int = 3, layers=(0, 1), top_k: int = 2, weights: bool = True
    ) -> list[dict]:
        ids = routing(tokens, len(layers), top_k).tolist()
        return [
            {
                "dataset": "gsm8k",
                "problem_id": problem,
                "layer": layer,
                "token_idx": token,
                "experts": ids[token][position],
            }
            | ({"gating_probs": [0.75, 0.25][:top_k]} if weights else {})
            for token in range(tokens)
            for position, layer in enumerate(layers)
        ]

    return make


def test_records_become_sequences_in_order_of_appearance(
    records_of, routing, save_lines, run_import, load_all, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", records_of(7) + records_of("x", tokens=5))
    result = run_import("records", path, phase="decode")
    assert (result.dropped.total, result.spec.moe_layers, result.spec.weights_normalized) == (0, (0, 1), True)
    first, second = load_all(tmp_path / "run")
    assert (first.dataset, first.sequence_key, second.sequence_key) == ("gsm8k", "7", "x")
    assert (second.expert_ids_TLK == routing(5, 2, 2)).all()
    assert second.phase_T.all()


def test_any_order_of_records_over_several_files_gives_the_same_sequences(
    records_of, save_lines, run_import, load_all, assert_equal, tmp_path
):
    records = records_of(1) + records_of(2, tokens=4)
    run_import("records", save_lines(tmp_path / "a.jsonl", records), output_dir=tmp_path / "sorted")
    mixed = [records[0], records[-1], *np.random.default_rng(0).permutation(records[1:-1])]
    paths = [save_lines(tmp_path / f"{n}.jsonl", mixed[n::3]) for n in range(3)]
    run_import("records", *paths, output_dir=tmp_path / "mixed")
    assert_equal(load_all(tmp_path / "mixed"), load_all(tmp_path / "sorted"))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_sequence_that_lacks_any_record_or_has_one_twice_is_never_kept(
    data, records_of, save_lines, tmp_path_factory
):
    whole = records_of("whole", tokens=3, layers=(0, 1, 2))
    broken = records_of("broken", tokens=3, layers=(0, 1, 2))
    place = data.draw(st.integers(0, len(broken) - 1))
    if data.draw(st.booleans()):
        del broken[place]
    else:
        broken.append(broken[place])
    lines = data.draw(st.permutations(whole + broken))
    path = save_lines(tmp_path_factory.mktemp("broken") / "a.jsonl", lines)
    source = RecordsSource([path], ImportSettings("records", path.parent / "run", 16, "m"))
    found = {type(each).__name__: each for each in source}
    source.close()
    assert found["Record"].key == "whole"
    assert "sequence broken" in found["Dropped"].where


def without(records: list[dict], token: int, layer: int) -> list[dict]:
    return [each for each in records if (each["token_idx"], each["layer"]) != (token, layer)]


def test_each_kind_of_hole_is_named(records_of, save_lines, run_import, tmp_path):
    lines = [
        *without(records_of("lacking"), 1, 1),
        *without(without(records_of("holed"), 1, 0), 1, 1),
        *without(without(records_of("headless"), 0, 0), 0, 1),
        *records_of("twice"),
        records_of("twice")[3],
        *records_of("sound"),
    ]
    path = save_lines(tmp_path / "a.jsonl", lines)
    result = run_import("records", path)
    places = {reason: found["places"] for reason, found in result.dropped.facts().items()}
    at = f"{path}:{{}} (sequence {{}} of gsm8k): "
    assert places == {
        "a token lacks a layer": [at.format(1, "lacking") + "token 1 has no record of layer 1"],
        "a token is missing": [
            at.format(6, "holed") + "token 1 of 3 has no record",
            at.format(10, "headless") + "token 0 of 3 has no record",
        ],
        "a token and layer recorded twice": [at.format(14, "twice") + "token 1, layer 1, also in line 20"],
    }
    assert result.sequences == 1


def test_layers_renumbered_after_a_loss_leave_the_sequence_out(
    records_of, save_lines, run_import, only_reason, tmp_path
):
    """One record of layer 1 was never written, and the source counted on: only the last token shows it."""
    slipped = without(records_of("slipped", tokens=4), 1, 1)
    for each in slipped:
        if each["layer"] == 1 and each["token_idx"] > 1:
            each["token_idx"] -= 1
    path = save_lines(tmp_path / "a.jsonl", slipped + records_of())
    assert only_reason(run_import("records", path)).endswith("token 3 has no record of layer 1")


def test_layers_counted_from_1_contradict_layers_declared_from_0(
    records_of, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", records_of(0, layers=(1, 2)))
    assert only_reason(run_import("records", path, moe_layers=(0, 1))).endswith(
        "its layers are 1-2, --moe_layers is 0-1"
    )
    assert run_import("records", path, num_layers=2).spec.moe_layers == (1, 2)


def test_sequences_whose_layers_differ_are_refused_until_the_options_say_which_is_whole(
    records_of, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", records_of(0) + records_of(1, layers=(0, 1, 2)))
    with pytest.raises(
        ConfigurationError, match=r"MoE layers 0-2 and 2 experts per token, but .*: layers 0-1 and 2; say"
    ):
        run_import("records", path)
    result = run_import("records", path, moe_layers=(0, 1, 2))
    assert only_reason(result).startswith("layers contradict the options")
    assert result.sequences == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"experts": [1.0, 2.0]}, "not a record: PLACE: 'experts' is [1.0, 2.0], wanted a list of integers"),
        ({"experts": [True, 2]}, "not a record: PLACE: 'experts' is [True, 2]"),
        ({"experts": ["1", "2"]}, "not a record: PLACE: 'experts' is ['1', '2']"),
        ({"experts": 3}, "not a record: PLACE: 'experts' is 3"),
        ({"experts": [3, 3]}, "an expert twice: PLACE"),
        ({"experts": [3, 16]}, "expert id out of range: PLACE"),
        ({"experts": [3], "gating_probs": [1.0]}, "experts per token vary: PLACE"),
        ({"gating_probs": [0.1] * 16}, "weights do not fit the experts: PLACE: 16 weights for 2 experts"),
        ({"gating_probs": ["a", "b"]}, "not a record: PLACE: 'gating_probs' is ['a', 'b']"),
        ({"gating_probs": [float("nan"), 0.5]}, "weight not finite: PLACE"),
        ({"gating_probs": [1e9, 0.5]}, "weight not finite: PLACE"),
        ({"gating_probs": None}, "weights missing: PLACE"),
        ({"layer": "1"}, "not a record: PLACE: 'layer' is 1, wanted a number from 0"),
        ({"layer": -1}, "not a record: PLACE: 'layer' is -1"),
        ({"layer": 2}, "a token lacks a layer: PLACE"),
        ({"token_idx": 1.0}, "not a record: PLACE: 'token_idx' is 1.0"),
        ({"token_idx": 2**70}, "not a record: PLACE: 'token_idx' is"),
        ({"token_id": "a"}, "not a record: PLACE: 'token_id' is a"),
        ({"token_id": 7}, "a token's records disagree: PLACE"),
        ({"token": "other"}, "a token's records disagree: PLACE"),
        ({"token": 3}, "not a record: PLACE: 'token' is 3, wanted a string"),
        ({"phase": "decode"}, "a token's records disagree: PLACE"),
        ({"phase": "warm"}, "not a record: PLACE: 'phase' is warm"),
        ({"problem_id": None}, "not a record: PLACE: 'problem_id' is None, wanted the sequence's id"),
        ({"problem_id": "elsewhere"}, "a token is missing: PLACE"),
        ({"sequence_key": "other"}, "a sequence's records disagree: PLACE: 'sequence_key' is other"),
    ],
)
def test_one_bad_record_leaves_out_its_sequence_and_no_other(
    change, reason, records_of, save_lines, run_import, tmp_path
):
    bad = [each | {"token_id": 6, "token": "six", "phase": "prefill"} for each in records_of("bad")]
    bad[3] |= change
    path = save_lines(tmp_path / "a.jsonl", bad + records_of("good"))
    result = run_import("records", path, dataset="d")
    found = [f"{name}: {place}" for name, facts in result.dropped.facts().items() for place in facts["places"]]
    name, detail = reason.split("PLACE")
    assert any(each.startswith(f"{name}{path}:") and detail in each for each in found), found
    assert (result.sequences, result.tokens) == (1, 3)


def test_fields_of_other_names_are_mapped(save_lines, run_import, load_all, tmp_path):
    lines = [
        {
            "req": "r",
            "l": layer,
            "pos": token,
            "topk_ids": [layer + 1, 9],
            "w": [0.5, 0.25],
            "id": token + 40,
            "s": "ab"[token],
        }
        for layer in (0, 1)
        for token in (0, 1)
    ]
    fields = {
        "sequence": "req",
        "layer": "l",
        "token": "pos",
        "experts": "topk_ids",
        "weights": "w",
        "token_id": "id",
        "text": "s",
    }
    result = run_import("records", save_lines(tmp_path / "log.jsonl", lines), fields=fields)
    (found,) = load_all(tmp_path / "run")
    assert result.dropped.total == 0
    assert (found.dataset, found.sequence_key, found.tokens_T) == ("log", "r", ["a", "b"])
    assert found.token_ids_T.tolist() == [40, 41]
    assert found.expert_ids_TLK[0].tolist() == [[1, 9], [2, 9]]


def test_files_are_sequences_where_the_sequence_field_is_mapped_to_nothing(
    records_of, save_lines, run_import, load_all, tmp_path
):
    paths = []
    for number in (1, 2):
        lines = [{key: value for key, value in each.items() if key != "problem_id"} for each in records_of()]
        paths.append(save_lines(tmp_path / f"p{number}.jsonl", lines))
    run_import("records", *paths, fields={"sequence": ""})
    assert [found.sequence_key for found in load_all(tmp_path / "run")] == ["p1", "p2"]


def test_lines_without_a_sequence_are_named_and_complete_sequences_kept(records_of, save_lines, run_import, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", [{"type": "meta"}, *records_of(), b'{"dataset": "gsm8k", "probl'])
    result = run_import("records", path)
    assert [place.split(": ")[0] for place in result.dropped.facts()["not a record"]["places"]] == [
        f"{path}:1",
        f"{path}:8",
    ]
    assert result.sequences == 1
