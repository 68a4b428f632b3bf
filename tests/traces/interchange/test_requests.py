"""Requests become sequences by falling weight where there is one; what does not hold up is left out by line."""

import gzip
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from groundwork.errors import ConfigurationError
from traces.interchange.exporting import WRITERS, export_traces
from traces.reader import TraceDataset
from traces.verify import verify

REAL = Path(__file__).resolve().parents[3] / "../shared/traces"


@pytest.fixture
def request_of(routing, packed):
    def make(number: int, tokens: int = 4, layers: int = 2, top_k: int = 3, weights: bool = True, **changes) -> dict:
        record = {
            "id": f"r{number}",
            "dataset": "quiz",
            "shape": [tokens, layers, top_k],
            "tokens": [f"t{i}" for i in range(tokens)],
            "routed_experts": packed(routing(tokens, layers, top_k, number)),
        }
        if weights:
            values = np.random.default_rng(number).dirichlet(np.ones(top_k), (tokens, layers))
            record["routing_weights"] = packed(values, "<f2")
        return record | changes

    return make


def test_weighted_requests_are_stored_by_falling_weight(
    request_of, routing, save_lines, run_import, load_all, tmp_path
):
    path = save_lines(tmp_path / "quiz.jsonl", [request_of(n, tokens=n + 1) for n in range(9)])
    result = run_import("requests", path, phase="decode", shard_size_mb=0.0005)
    assert (result.sequences, result.tokens, result.dropped.total) == (9, 45, 0)
    assert result.shards > 1
    assert (result.spec.expert_order, result.spec.weights_normalized) == ("weight", True)
    assert verify(tmp_path / "run") == []
    for number, found in enumerate(load_all(tmp_path / "run")):
        given_ids = routing(number + 1, 2, 3, number)
        given_weights = np.random.default_rng(number).dirichlet(np.ones(3), (number + 1, 2)).astype(np.float16)
        assert (found.sequence_key, found.dataset, found.tokens_T[0]) == (f"r{number}", "quiz", "t0")
        assert found.phase_T.all()
        assert (found.token_ids_T == -1).all()
        for t, layer in np.ndindex(number + 1, 2):
            pairs = zip(given_ids[t, layer].tolist(), given_weights[t, layer].tolist(), strict=True)
            expected = sorted(pairs, key=lambda pair: -pair[1])
            assert found.expert_ids_TLK[t, layer].tolist() == [expert for expert, _ in expected]
            assert found.routing_weights_TLK[t, layer].tolist() == [weight for _, weight in expected]


def test_requests_without_weights_keep_their_order_and_get_no_weights(
    request_of, routing, save_lines, run_import, load_all, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [request_of(n, weights=False) for n in range(3)])
    result = run_import("requests", path, moe_layers=(1, 3))
    assert (result.spec.expert_order, result.spec.store, result.spec.moe_layers) == ("unknown", (), (1, 3))
    assert TraceDataset(tmp_path / "run").available == {"ids", "tokens"}
    for number, found in enumerate(load_all(tmp_path / "run")):
        assert (found.expert_ids_TLK == routing(4, 2, 3, number)).all()
        assert found.routing_weights_TLK is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [4, 2]}, "not a record: PLACE: shape is [4, 2]"),
        ({"shape": [4, 2, True]}, "not a record: PLACE: shape is [4, 2, True]"),
        ({"shape": [10**20, 2, 3]}, "array size does not fit: PLACE: routed_experts holds 24 values"),
        ({"shape": [4, 3, 3]}, "array size does not fit: PLACE: routed_experts holds 24 values, wanted 36"),
        ({"tokens": ["a"]}, "rows do not match tokens: PLACE: 1 entries of tokens_T for 4 rows"),
        ({"tokens": "abcd"}, "not a record: PLACE: the tokens are no list of strings"),
        ({"tokens": [1, 2, 3, 4]}, "not a record: PLACE: the tokens are no list of strings"),
        ({"token_ids": [1.0, 2.0, 3.0, 4.0]}, "not a record: PLACE: the token ids are no list of integers"),
        ({"token_ids": [2**31, 0, 0, 0]}, "not a record: PLACE: the token ids are no list of integers"),
        ({"routed_experts": "*"}, "not a record: PLACE: routed_experts is no base64"),
        ({"routed_experts": [1, 2]}, "not a record: PLACE: routed_experts is list, wanted base64"),
        ({"routed_experts": None}, "not a record: PLACE: routed_experts is NoneType"),
        ({"phase": "warm"}, "not a record: PLACE: phase is warm"),
        ({"phase": [0, 0, 1]}, "not a record: PLACE: phase is [0, 0, 1], wanted prefill, decode, or 4 numbers"),
        ({"moe_layers": [1, 1]}, "not a record: PLACE: moe_layers is [1, 1], wanted rising layer numbers"),
        ({"moe_layers": [0, 1, 2]}, "layers contradict the options: PLACE: 2 layers, but MoE layers 0-2"),
    ],
)
def test_a_malformed_request_is_left_out_by_line_and_the_others_are_kept(
    changes, reason, request_of, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [request_of(0), request_of(1) | changes, request_of(2)])
    result = run_import("requests", path)
    assert only_reason(result).startswith(reason.replace("PLACE", f"{path}:2"))
    assert result.sequences == 2
    assert verify(tmp_path / "run") == []


@pytest.mark.parametrize("line", [b"[]", b"{", b'{"id": "\xe9"}', b"[" * 100_000, b"3"])
def test_a_line_that_is_no_request_is_left_out(line, request_of, save_lines, run_import, only_reason, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", [line, request_of(0)])
    result = run_import("requests", path)
    assert only_reason(result).startswith(f"not a record: {path}:1: ")
    assert result.sequences == 1


def test_impossible_choices_are_left_out_by_token_and_layer(
    request_of, packed, routing, save_lines, run_import, tmp_path
):
    good = routing(4, 2, 3)
    twice, beyond, negative = good.copy(), good.copy(), good.copy()
    twice[3, 1] = 5
    beyond[2, 0, 1] = 16
    negative[1, 1, 2] = -1
    bad = [request_of(n, routed_experts=packed(ids)) for n, ids in enumerate([twice, beyond, negative])]
    bad.append(request_of(3, routing_weights=packed(np.full((4, 2, 3), np.nan), "<f2")))
    path = save_lines(tmp_path / "a.jsonl", [*bad, request_of(4)])
    result = run_import("requests", path)
    assert result.sequences == 1
    facts = result.dropped.facts()
    places = {reason: found["places"] for reason, found in facts.items()}
    assert places["an expert twice"] == [f"{path}:1: token 3, layer 1: an expert is named twice: [5, 5, 5]"]
    assert [place.split(": an id")[0] for place in places["expert id out of range"]] == [
        f"{path}:2: token 2, layer 0",
        f"{path}:3: token 1, layer 1",
    ]
    assert places["weight not finite"][0].startswith(f"{path}:4: token 0, layer 0: a weight is no finite float16: [nan")


def test_requests_that_disagree_are_refused_until_the_options_say_what_is_whole(
    request_of, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [request_of(0), request_of(1, layers=3), request_of(2)])
    with pytest.raises(
        ConfigurationError, match=r"a\.jsonl:2: MoE layers 0-2 and 3 .*a\.jsonl:1: layers 0-1 and 3; say"
    ):
        run_import("requests", path)
    assert not (tmp_path / "run").exists()
    result = run_import("requests", path, num_layers=2)
    assert only_reason(result) == f"layers contradict the options: {path}:2: 3 layers, --num_layers is 2"
    assert result.sequences == 2


def test_a_request_with_another_number_of_experts_is_left_out_where_top_k_is_given(
    request_of, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [request_of(0, top_k=2), request_of(1)])
    result = run_import("requests", path, top_k=3)
    assert only_reason(result) == f"experts per token contradict the options: {path}:1: 2 experts, --top_k is 3"


def test_a_request_without_weights_among_weighted_ones_is_left_out(
    request_of, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [request_of(0, weights=False), request_of(1)])
    result = run_import("requests", path)
    assert only_reason(result).startswith(f"weights missing: {path}:1: ")
    assert (result.sequences, result.spec.store) == (1, ("weights",))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real traces of ../shared are not here")
def test_real_requests_with_weights_import_and_verify(run_import, tmp_path):
    paths = [REAL / f"gpt-oss-20b.{name}.jsonl.gz" for name in ("tulu3_persona_if", "Polyglot-or-Not_Fact-Completion")]
    result = run_import("requests", *paths, num_experts=32, phase="decode")
    assert (result.spec.num_layers, result.spec.top_k, result.sequences, result.dropped.total) == (24, 4, 8, 0)
    assert TraceDataset(tmp_path / "run").datasets == ["tulu3_persona_if", "Polyglot-or-Not_Fact-Completion"]
    assert verify(tmp_path / "run") == []


@pytest.mark.skipif(not REAL.is_dir(), reason="the real traces of ../shared are not here")
def test_real_requests_without_weights_come_back_from_every_format(run_import, load_all, assert_equal, tmp_path):
    with gzip.open(REAL / "deepseek-v2-lite.prompts.jsonl.gz") as lines:
        (tmp_path / "some.jsonl").write_bytes(b"".join(islice(lines, 20)))
    result = run_import("requests", tmp_path / "some.jsonl", num_experts=64, moe_layers=tuple(range(1, 27)))
    assert (result.sequences, result.spec.top_k, result.spec.moe_layers[0], result.dropped.total) == (20, 6, 1, 0)
    for record_format in WRITERS:
        out = tmp_path / record_format
        exported = export_traces(tmp_path / "run", out, record_format)
        paths = [out] if record_format == "flame" else [out / name for name in exported.files]
        back = tmp_path / f"{record_format}-back"
        run_import(record_format, *paths, num_experts=64, output_dir=back)
        assert_equal(load_all(back), load_all(tmp_path / "run"))
