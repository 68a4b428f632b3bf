"""The spec survives its footer and refuses what is inconsistent; a sequence that does not fit is refused."""

from dataclasses import replace

import numpy as np
import pytest

from traces.schema import TraceSpec, arrow_schema


def test_spec_survives_footer_and_json(make_spec):
    spec = make_spec(store=("weights", "lookahead"), horizons=2, lookahead_norm="own", moe_layers=(1, 2, 5))
    assert TraceSpec.from_footer(spec.to_footer()) == spec
    assert TraceSpec.from_footer(arrow_schema(spec).metadata) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k 9 exceeds num_experts 8"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"moe_layers": (0, 1)}, "2 moe_layers for num_layers 3"),
        ({"moe_layers": (0, 2, 2)}, "do not rise"),
        ({"expert_order": "size"}, "expert_order is 'size'"),
        ({"store": ("weights", "router_input")}, "is not a choice of weights, logits, lookahead"),
        ({"horizons": 1}, "horizons 1 does not fit store"),
        ({"store": ("lookahead",), "horizons": 0}, "horizons 0 does not fit store"),
        ({"store": ("lookahead",), "horizons": 1, "lookahead_norm": "mine"}, "lookahead_norm 'mine' does not fit"),
        ({"lookahead_norm": "next"}, "lookahead_norm 'next' does not fit horizons 0"),
    ],
)
def test_inconsistent_spec_is_refused(make_spec, changes, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**changes)


def test_other_format_version_is_refused(make_spec):
    with pytest.raises(ValueError, match="format version 2"):
        TraceSpec.from_json(make_spec().to_json() | {"format_version": 2})


def test_ids_take_one_byte_up_to_256_experts(make_spec):
    assert make_spec(num_experts=256).id_dtype == np.uint8
    assert make_spec(num_experts=257).id_dtype == np.uint16


def test_unstorable_sequence_is_refused_with_token_and_layer(make_spec, make_sequences):
    spec = make_spec()
    (sound,) = make_sequences(spec, [5])
    sound.check(spec)
    ids, weights = sound.expert_ids_TLK.copy(), sound.routing_weights_TLK.copy()
    ids[3, 1] = 4
    weights[2, 0] = np.nan
    faults = {
        "token 3, layer 1: an expert twice": replace(sound, expert_ids_TLK=ids),
        "token 2, layer 0: a weight that is not finite": replace(sound, routing_weights_TLK=weights),
        "weights that rise": replace(sound, routing_weights_TLK=sound.routing_weights_TLK[..., ::-1]),
        "weights that do not sum to 1": replace(sound, routing_weights_TLK=sound.routing_weights_TLK / np.float16(2)),
        "an expert id of E or more": replace(sound, expert_ids_TLK=sound.expert_ids_TLK + np.uint8(8)),
        "routing_weights_TLK is missing": replace(sound, routing_weights_TLK=None),
        "expert_ids_TLK is int64": replace(sound, expert_ids_TLK=sound.expert_ids_TLK.astype(np.int64)),
        "4 token strings for 5 tokens": replace(sound, tokens_T=sound.tokens_T[:4]),
    }
    for message, broken in faults.items():
        with pytest.raises(ValueError, match=message):
            broken.check(spec)
