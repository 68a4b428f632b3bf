"""No value in a source ends an import: a record is stored soundly or left out with a reason."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.interchange.importing import import_traces
from traces.interchange.settings import FIELDS, ImportSettings
from traces.verify import verify

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def sound(routing, packed):
    """Return a sound line of each format and all keys that its reader looks at, outer and inner."""
    ids = packed(routing(4, 2, 3))
    request = {"id": 1, "shape": [4, 2, 3], "routed_experts": ids}
    meta = {"id": "s", "prompt_tokens": 3, "completion_tokens": 2, "routed_experts": ids}
    record = {"problem_id": 1, "layer": 0, "token_idx": 0, "experts": [1, 2, 3]}
    extra = ["tokens", "token_ids", "moe_layers", "phase", "routing_weights", "dataset"]
    lists = ["input_token_logprobs", "output_token_logprobs", "routed_experts_start_len"]
    top = ["output_ids", "choices", "usage", "sglext", "meta_info", "expert_speculation"]
    return {
        "requests": (request, [*request, *extra], None),
        "sglang": ({"meta_info": meta, "expert_speculation": {}}, top, [*meta, *lists, *extra, "layers", "top_k"]),
        "records": (record, [*FIELDS.values()], None),
    }


@pytest.mark.parametrize("record_format", ["requests", "sglang", "records"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_anywhere_is_stored_soundly_or_left_out(record_format, data, sound, save_lines, tmp_path_factory):
    line, keys, inner = sound[record_format]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=2))
    changed = line | changes
    if inner is not None:
        name = data.draw(st.sampled_from(["meta_info", "expert_speculation"]))
        if isinstance(changed.get(name), dict):
            changed[name] = changed[name] | data.draw(st.dictionaries(st.sampled_from(inner), JSON, max_size=2))
    folder = tmp_path_factory.mktemp("hostile")
    hostile = data.draw(st.sampled_from([changed, changes, data.draw(JSON)]))
    path = save_lines(folder / "a.jsonl", [hostile])
    told = {} if record_format == "records" else {"num_layers": 2, "top_k": 3}
    result = import_traces([path], ImportSettings(record_format, folder / "run", 16, "m", **told))
    if result.spec is not None:
        assert verify(folder / "run") == []
    else:
        assert result.dropped.total > 0 or hostile == []  # an empty batch of responses holds no record
