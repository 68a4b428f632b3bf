"""vLLM's arrays: one or many sequences a file, prompt and sampled rows joined by name, dense layers as declared."""

import io
import zipfile

import numpy as np
import pytest

from groundwork.errors import ConfigurationError


def test_an_array_alone_is_a_sequence_named_after_its_file(routing, run_import, load_all, tmp_path):
    np.save(tmp_path / "greeting.npy", routing(5, 3, 2).astype(np.uint8))
    result = run_import("vllm", tmp_path / "greeting.npy", phase="decode")
    (found,) = load_all(tmp_path / "run")
    assert (found.sequence_key, found.dataset, result.dropped.total) == ("greeting", "greeting", 0)
    assert (found.expert_ids_TLK == routing(5, 3, 2)).all()
    assert found.phase_T.all()


def test_arrays_of_any_name_are_sequences_by_themselves(routing, run_import, load_all, tmp_path):
    np.savez(tmp_path / "a.npz", q1=routing(5, 3, 2), q2=routing(2, 3, 2, 1))
    run_import("vllm", tmp_path / "a.npz", dataset="quiz")
    found = load_all(tmp_path / "run")
    assert [(each.dataset, each.sequence_key, each.num_tokens) for each in found] == [
        ("quiz", "q1", 5),
        ("quiz", "q2", 2),
    ]


@pytest.mark.parametrize("prefix", ["", "first."])
@pytest.mark.parametrize("split", [True, False])
def test_prompt_and_sampled_rows_join_with_their_ids_and_phases(prefix, split, routing, run_import, load_all, tmp_path):
    ids = routing(5, 3, 2).astype(np.int16)
    parts = {"prompt_routed_experts": ids[:3], "routed_experts": ids[3:]} if split else {"routed_experts": ids}
    parts |= {"prompt_token_ids": np.array([5, 6, 7]), "token_ids": np.array([8, 9, 10])}
    np.savez(tmp_path / "a.npz", **{prefix + name: array for name, array in parts.items()})
    assert run_import("vllm", tmp_path / "a.npz").dropped.total == 0
    (found,) = load_all(tmp_path / "run")
    assert found.sequence_key == ("first" if prefix else "a")
    assert (found.expert_ids_TLK == ids).all()
    assert found.phase_T.tolist() == [0, 0, 0, 1, 1]
    assert found.token_ids_T.tolist() == [5, 6, 7, 8, 9]


def test_rows_that_the_token_ids_do_not_explain_are_left_out(routing, run_import, tmp_path):
    ids = routing(5, 3, 2)
    sequences = {
        "surplus": {"routed_experts": ids, "prompt_token_ids": [1, 2], "token_ids": [3, 4, 5]},
        "short": {"routed_experts": ids, "prompt_token_ids": [1, 2, 3], "token_ids": [4, 5, 6, 7]},
        "prompt": {
            "prompt_routed_experts": ids[:2],
            "routed_experts": ids[2:],
            "prompt_token_ids": [1],
            "token_ids": [1] * 5,
        },
        "uncounted": {"routed_experts": ids, "token_ids": [1, 2]},
        "wrong_type": {"routed_experts": ids, "prompt_token_ids": [0.5]},
        "good": {"routed_experts": ids, "prompt_token_ids": [1, 2, 3, 4, 5]},
    }
    np.savez(tmp_path / "a.npz", **{f"{n}.{part}": x for n, parts in sequences.items() for part, x in parts.items()})
    result = run_import("vllm", tmp_path / "a.npz")
    places = {reason: found["places"] for reason, found in result.dropped.facts().items()}
    at = f"{tmp_path / 'a.npz'}[{{}}]: "
    assert places["rows do not match tokens"] == [
        at.format("surplus") + "5 rows, wanted 2 prompt ids + 3 sampled ids - 1",
        at.format("short") + "5 rows, wanted 3 prompt ids + 4 sampled ids - 1",
        at.format("prompt") + "2 prompt rows for 1 prompt ids",
    ]
    assert places["rows can not be counted"] == [at.format("uncounted") + "token_ids without prompt_token_ids"]
    assert places["not a record"][0].startswith(at.format("wrong_type") + "prompt_token_ids is float64")
    assert result.sequences == 1


def test_positions_that_the_prefix_cache_skipped_leave_their_sequence_out(routing, run_import, only_reason, tmp_path):
    ids = routing(5, 3, 2)
    ids[:2] = -1
    np.savez(tmp_path / "a.npz", cached=ids, whole=routing(5, 3, 2))
    assert "[cached]: token 0, layer 0: an id is not in 0..15: [-1, -1]" in only_reason(
        run_import("vllm", tmp_path / "a.npz")
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_of_zeros_is_dense_only_where_that_is_said(top_k, routing, run_import, only_reason, load_all, tmp_path):
    ids = routing(5, 3, top_k)
    ids[:, 0] = 0
    np.savez(tmp_path / "a.npz", q=ids)
    undeclared = run_import("vllm", tmp_path / "a.npz")
    assert "a layer of zeros that is not declared dense" in only_reason(undeclared)
    assert "layer 0 is all 0; say with --moe_layers" in only_reason(undeclared)
    assert not (tmp_path / "run").exists()
    declared = run_import("vllm", tmp_path / "a.npz", moe_layers=(1, 2))
    assert declared.spec.moe_layers == (1, 2)
    assert (load_all(tmp_path / "run")[0].expert_ids_TLK == ids[:, 1:]).all()


def test_with_one_expert_per_token_a_declared_moe_layer_may_be_all_expert_0(routing, run_import, load_all, tmp_path):
    ids = routing(5, 3, 1)
    ids[:, 1] = 0
    np.save(tmp_path / "a.npy", ids)
    run_import("vllm", tmp_path / "a.npy", moe_layers=(0, 1, 2))
    assert not load_all(tmp_path / "run")[0].expert_ids_TLK[:, 1].any()


def test_with_several_a_declared_moe_layer_of_zeros_is_still_impossible(routing, run_import, only_reason, tmp_path):
    ids = routing(5, 3, 2)
    ids[:, 1] = 0
    np.save(tmp_path / "a.npy", ids)
    assert "layer 1 is all 0; it is declared MoE" in only_reason(
        run_import("vllm", tmp_path / "a.npy", moe_layers=(0, 1, 2))
    )


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"moe_layers": (1, 2)}, "a layer declared dense holds experts: PLACE: layer 0 is not among the MoE layers"),
        ({"moe_layers": (1, 2, 3, 4)}, "layers contradict the options: PLACE: 3 layers, but MoE layers 1-4: wanted 4"),
        ({"num_layers": 4}, "layers contradict the options: PLACE: 3 layers, --num_layers is 4"),
        ({"top_k": 3}, "experts per token contradict the options: PLACE: 2 experts, --top_k is 3"),
        ({"num_experts": 4}, "expert id out of range: PLACE: token 0, layer 0: an id is not in 0..3"),
    ],
)
def test_options_that_contradict_the_array_are_named_with_it(told, reason, routing, run_import, only_reason, tmp_path):
    np.save(tmp_path / "a.npy", routing(5, 3, 2))
    found = only_reason(run_import("vllm", tmp_path / "a.npy", **told))
    assert found.startswith(reason.replace("PLACE", str(tmp_path / "a.npy")))


def test_what_is_no_array_of_choices_is_left_out_and_nothing_pickled_is_read(routing, run_import, tmp_path):
    np.savez(
        tmp_path / "a.npz",
        floats=routing(5, 3, 2).astype(float),
        flat=routing(5, 3, 2).reshape(-1),
        empty=np.zeros((0, 3, 2), int),
        pickled=np.array([{"a": 1}], object),
        good=routing(5, 3, 2),
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        huge = io.BytesIO()
        np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (10**12, 3, 2)})
        archive.writestr("huge.npy", huge.getvalue())
        archive.writestr("notes.txt", "no array")
    result = run_import("vllm", tmp_path / "a.npz")
    places = [place for found in result.dropped.facts().values() for place in found["places"]]
    assert sorted(place.split("[")[1].split("]")[0] for place in places) == [
        "empty", "flat", "floats", "huge", "notes.txt", "pickled",
    ]  # fmt: skip
    assert result.sequences == 1


def test_weights_beside_the_array_order_it(routing, run_import, load_all, tmp_path):
    ids = routing(5, 3, 2)
    weights = np.broadcast_to(np.array([0.25, 0.75], np.float32), ids.shape)
    np.savez(tmp_path / "a.npz", **{"q.routed_experts": ids, "q.routing_weights": weights})
    result = run_import("vllm", tmp_path / "a.npz")
    (found,) = load_all(tmp_path / "run")
    assert (found.expert_ids_TLK == ids[..., ::-1]).all()
    assert (result.spec.expert_order, result.spec.weights_normalized) == ("weight", True)


def test_weights_of_another_shape_leave_their_sequence_out(routing, run_import, only_reason, tmp_path):
    over_all = np.full((5, 3, 16), 1 / 16)
    np.savez(tmp_path / "a.npz", **{"q.routed_experts": routing(5, 3, 2), "q.routing_weights": over_all})
    assert "weights do not fit the experts" in only_reason(run_import("vllm", tmp_path / "a.npz"))


@pytest.mark.parametrize("content", [b"", b"no array", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00\xff\xff"])
def test_a_file_that_is_none_of_numpys_is_refused(content, run_import, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"a\.npz: no \.npy or \.npz file"):
        run_import("vllm", tmp_path / "a.npz")
