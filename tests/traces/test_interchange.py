"""Requests become trace folders, by falling weight where there is one; what does not fit is refused by line."""

import base64
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from groundwork.errors import ConfigurationError
from traces.interchange import import_requests, read_requests
from traces.reader import TraceDataset
from traces.verify import verify

REAL = Path(__file__).resolve().parents[2] / "../shared/traces"


def request(number: int, tokens: int = 4, layers: int = 2, top_k: int = 3, weights: bool = True, **changes) -> dict:
    generator = np.random.default_rng(number)
    ids = generator.random((tokens, layers, 16)).argsort(-1)[..., :top_k].astype("<i4")
    record = {
        "id": f"r{number}",
        "dataset": "quiz",
        "shape": [tokens, layers, top_k],
        "tokens": [f"t{i}" for i in range(tokens)],
        "routed_experts": base64.b64encode(ids.tobytes()).decode(),
    }
    if weights:
        values = generator.dirichlet(np.ones(top_k), (tokens, layers)).astype("<f2")
        record["routing_weights"] = base64.b64encode(values.tobytes()).decode()
    return record | changes


def save(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["quiz.jsonl", "quiz.jsonl.gz"])
def test_weighted_requests_are_stored_by_falling_weight(tmp_path, name):
    path = save(tmp_path / name, [request(n, tokens=n + 1) for n in range(9)])
    result = import_requests([path], tmp_path / "run", 16, "m", phase="decode", shard_size_mb=0.0005)
    assert (result.sequences, result.tokens) == (9, 45)
    assert result.shards > 1
    assert (result.spec.expert_order, result.spec.weights_normalized) == ("weight", True)
    assert verify(tmp_path / "run") == []
    for found, given in zip(
        TraceDataset(tmp_path / "run").sequences("all", ("weights", "tokens")), read_requests(path), strict=True
    ):
        assert (found.sequence_key, found.tokens_T) == (given.key, given.tokens_T)
        assert found.phase_T.all()
        assert (found.token_ids_T == -1).all()
        assert (np.diff(found.routing_weights_TLK.astype(np.float32)) <= 0).all()
        for t, layer in np.ndindex(found.expert_ids_TLK.shape[:2]):
            pairs = zip(given.ids_TLK[t, layer].tolist(), given.weights_TLK[t, layer].tolist(), strict=True)
            expected = sorted(pairs, key=lambda pair: -pair[1])
            assert found.expert_ids_TLK[t, layer].tolist() == [expert for expert, _ in expected]
            assert found.routing_weights_TLK[t, layer].tolist() == [weight for _, weight in expected]


def test_requests_without_weights_keep_their_order_and_get_no_weights(tmp_path):
    path = save(tmp_path / "a.jsonl", [request(n, weights=False) for n in range(3)])
    result = import_requests([path], tmp_path / "run", 16, "m", moe_layers=[1, 3])
    assert (result.spec.expert_order, result.spec.store, result.spec.moe_layers) == ("unknown", (), (1, 3))
    dataset = TraceDataset(tmp_path / "run")
    assert dataset.available == {"ids", "tokens"}
    for found, given in zip(dataset.sequences(), read_requests(path), strict=True):
        assert (found.expert_ids_TLK == given.ids_TLK).all()
        assert found.routing_weights_TLK is None


NAN = base64.b64encode(np.full((4, 2, 3), np.nan, "<f2").tobytes()).decode()
TWICE = base64.b64encode(np.full((4, 2, 3), 5, "<i4").tobytes()).decode()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (request(1, layers=3), "3 layers and 3 experts per token, the first record has 2 and 3"),
        (request(1, top_k=2), "2 layers and 2 experts per token"),
        (request(1, weights=False), "lacks routing_weights, unlike the first record"),
        (request(1, shape=[4, 2]), "shape is"),
        (request(1, shape=[5, 2, 3]), "4 tokens, wanted 5"),
        (request(1, shape=[4, 3, 3]), "routed_experts holds 96 bytes, wanted 144"),
        (request(1) | {"tokens": ["a"]}, "1 tokens, wanted 4"),
        (request(1, routed_experts="*"), "routed_experts is no base64"),
        (request(1, routed_experts=TWICE), "token 0, layer 0: an expert twice"),
        (request(1, routing_weights=NAN), "a weight that is not finite"),
        ({"id": 1}, "no 'shape'"),
        ([], "not a request record"),
    ],
)
def test_unsound_request_is_refused_with_file_and_line_and_nothing_is_written(tmp_path, second, message):
    path = save(tmp_path / "a.jsonl", [request(0), second])
    with pytest.raises(ConfigurationError) as refused:
        import_requests([path], tmp_path / "run", 16, "m")
    assert str(refused.value).startswith(f"{path}:2: ")
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_expert_id_beyond_num_experts_is_refused_with_file_and_line(tmp_path):
    path = save(tmp_path / "a.jsonl", [request(0)])
    with pytest.raises(ConfigurationError, match=r"a\.jsonl:1: expert id \d+ is not in 0\.\.7; correct --num_experts"):
        import_requests([path], tmp_path / "run", 8, "m")


def test_bad_files_and_used_folders_are_refused(tmp_path):
    sound = save(tmp_path / "a.jsonl.gz", [request(n) for n in range(50)])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(sound.read_bytes()[:-100])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    for name, message in {
        "cut.jsonl.gz": "damaged gzip",
        "empty.jsonl": "holds no request",
        "latin.jsonl": "latin.jsonl:1: not a request record",
        "none.jsonl": "can not be read",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            import_requests([tmp_path / name], tmp_path / "run", 16, "m")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="used: holds something already"):
        import_requests([sound], tmp_path / "used", 16, "m")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real traces of ../shared are not here")
def test_real_requests_with_weights_import_and_verify(tmp_path):
    paths = [REAL / f"gpt-oss-20b.{name}.jsonl.gz" for name in ("tulu3_persona_if", "Polyglot-or-Not_Fact-Completion")]
    result = import_requests(paths, tmp_path / "run", 32, "gpt-oss-20b", phase="decode")
    assert (result.spec.num_layers, result.spec.top_k, result.sequences) == (24, 4, 8)
    assert TraceDataset(tmp_path / "run").datasets == ["tulu3_persona_if", "Polyglot-or-Not_Fact-Completion"]
    assert verify(tmp_path / "run") == []
