"""SGLang's responses: rows are counted from prompt and completion tokens, layers and experts come from the options."""

import json

import numpy as np
import pytest

from groundwork.errors import ConfigurationError

TOLD = {"num_layers": 3, "top_k": 2}


@pytest.fixture
def response(routing, packed):
    """Return a function that makes a `/generate` response: 3 prompt tokens, 2 sampled ones, hence 4 rows."""

    def make(number: int = 0, ids=None, output_ids=(8, 9), top=None, **meta) -> dict:
        ids = routing(4, 3, 2, number) if ids is None else ids
        info = {"id": f"s{number}", "prompt_tokens": 3, "completion_tokens": 2, "routed_experts": packed(ids)}
        return {"text": "ab", "output_ids": list(output_ids), "meta_info": info | meta} | (top or {})

    return make


def test_rows_are_prompt_and_sampled_tokens_but_the_last(response, routing, save_lines, run_import, load_all, tmp_path):
    path = save_lines(tmp_path / "chat.jsonl", [response()])
    result = run_import("sglang", path, **TOLD)
    (found,) = load_all(tmp_path / "run")
    assert result.dropped.total == 0
    assert (found.dataset, found.sequence_key) == ("chat", "s0")
    assert (found.expert_ids_TLK == routing(4, 3, 2)).all()
    assert found.phase_T.tolist() == [0, 0, 0, 1]
    assert found.token_ids_T.tolist() == [-1, -1, -1, 8]
    assert result.spec.expert_order == "unknown"


def test_token_lists_give_ids_and_strings(response, save_lines, run_import, load_all, tmp_path):
    logs = {
        "input_token_logprobs": [[None, 5, "<s>"], [-0.5, 6, "a"], [-0.1, 7, None]],
        "output_token_logprobs": [[-0.1, 8, "b"], [-0.2, 9, "c"]],
    }
    path = save_lines(tmp_path / "a.jsonl", [response(**logs)])
    run_import("sglang", path, **TOLD)
    (found,) = load_all(tmp_path / "run")
    assert found.token_ids_T.tolist() == [5, 6, 7, 8]
    assert found.tokens_T == ["<s>", "a", "", "b"]


@pytest.mark.parametrize("layout", ["one", "list", "lines", "batched lines", "one over several lines"])
def test_responses_are_found_in_every_layout_of_a_file(layout, response, run_import, load_all, tmp_path):
    responses = [response(n) for n in range(1 if layout.startswith("one") else 4)]
    text = {
        "one": lambda: json.dumps(responses[0]),
        "list": lambda: json.dumps(responses, indent=1),
        "lines": lambda: "\n".join(map(json.dumps, responses)),
        "batched lines": lambda: json.dumps(responses[:3]) + "\n\n" + json.dumps(responses[3:]),
        "one over several lines": lambda: json.dumps(responses[0], indent=2),
    }[layout]()
    (tmp_path / "a.json").write_text(text)
    run_import("sglang", tmp_path / "a.json", **TOLD)
    assert [found.sequence_key for found in load_all(tmp_path / "run")] == [f"s{n}" for n in range(len(responses))]


@pytest.mark.parametrize("place", ["sglext", "sgl_ext"])
def test_openai_responses_carry_the_array_beside_usage(
    place, routing, packed, save_lines, run_import, load_all, tmp_path
):
    extra = {place: {"routed_experts": packed(routing(4, 3, 2))}}
    choice = {"index": 0, "message": {"content": "ab"}}
    answer = {"id": "chatcmpl-1", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    lines = [answer | {"choices": [choice]} | extra, answer | {"choices": [choice | extra]}]
    run_import("sglang", save_lines(tmp_path / "a.jsonl", lines), **TOLD)
    found = load_all(tmp_path / "run")
    assert [each.sequence_key for each in found] == ["chatcmpl-1"] * 2
    assert all((each.expert_ids_TLK == routing(4, 3, 2)).all() for each in found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"prompt_tokens": 4},
            "array size does not fit: PLACE: 24 ids, wanted 4 + 2 - 1 tokens x 3 layers x 2 experts",
        ),
        ({"prompt_tokens": 4, "routed_experts_start_len": 1}, "and it starts at a later token"),
        ({"completion_tokens": None}, "rows can not be counted: PLACE: prompt_tokens 3, completion_tokens None"),
        ({"prompt_tokens": True}, "rows can not be counted: PLACE: prompt_tokens True"),
        ({"routed_experts": None}, "no routing: PLACE: the response has no routed_experts"),
        ({"routed_experts": "AAAA"}, "array size does not fit: PLACE: routed_experts holds 3 bytes"),
        ({"output_token_logprobs": [[0.0, 8, "b"]]}, "rows do not match tokens: PLACE: 2 output_ids, 1 logged tokens"),
        ({"output_ids": (8,)}, "rows do not match tokens: PLACE: 1 sampled tokens, completion_tokens is 2"),
        ({"output_ids": ("x", 9)}, "not a record: PLACE: the token ids are no list of integers"),
        ({"input_token_logprobs": [1, 2, 3]}, "not a record: PLACE: a token entry is 1"),
        ({"top": {"meta_info": {}, "choices": [{}, {}]}}, "not a record: PLACE: neither meta_info nor one choice"),
        ({"top": {"meta_info": None, "error": "no such model"}}, "not a record: PLACE: neither meta_info"),
    ],
)
def test_a_response_that_can_not_be_counted_is_left_out(
    changes, reason, response, save_lines, run_import, only_reason, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [response(), response(1, **changes)])
    result = run_import("sglang", path, **TOLD)
    assert reason.replace("PLACE", f"{path}:2") in only_reason(result)
    assert result.sequences == 1


@pytest.mark.parametrize("told", [{}, {"top_k": 2}, {"num_layers": 3}])
def test_without_a_shape_the_options_must_give_it(told, response, save_lines, run_import, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", [response()])
    with pytest.raises(ConfigurationError, match="have no shape; give --top_k, and --num_layers or --moe_layers"):
        run_import("sglang", path, **told)


def test_declared_dense_layers_are_cut_away(response, routing, save_lines, run_import, load_all, tmp_path):
    ids = np.zeros((4, 4, 2), int)
    ids[:, 1], ids[:, 3] = routing(4, 2, 2).transpose(1, 0, 2)
    path = save_lines(tmp_path / "a.jsonl", [response(ids=ids)])
    result = run_import("sglang", path, top_k=2, moe_layers=(1, 3))
    assert result.spec.moe_layers == (1, 3)
    (found,) = load_all(tmp_path / "run")
    assert (found.expert_ids_TLK == routing(4, 2, 2)).all()


def test_a_broken_line_among_responses_is_left_out(response, save_lines, run_import, only_reason, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", [b'{"text": ', response(), response(1)])
    result = run_import("sglang", path, **TOLD)
    assert only_reason(result).startswith(f"not a record: {path}:1: no JSON")
    assert result.sequences == 2
