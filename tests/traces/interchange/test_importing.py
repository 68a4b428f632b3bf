"""What all formats share: packings, options, killed imports, sources that change, the account of what is left out."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import zstandard

from groundwork.errors import ConfigurationError
from traces.interchange.record import KEPT_PLACES
from traces.interchange.settings import layers_text, parse_layers
from traces.manifest import read_manifest
from traces.plan import Plan
from traces.verify import verify


@pytest.fixture
def lines(routing, packed):
    """Return a function that makes sound requests."""

    def make(count: int, **changes) -> list[dict]:
        return [
            {"id": n, "shape": [4, 2, 3], "routed_experts": packed(routing(4, 2, 3, n))} | changes for n in range(count)
        ]

    return make


def as_text(lines: list) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


PACKINGS = {
    "a.jsonl": lambda text: text,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": lambda text: zstandard.compress(text[:100]) + zstandard.compress(text[100:]),
}


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("renamed", [False, True])
def test_files_are_unpacked_by_their_first_bytes(name, renamed, lines, run_import, load_all, tmp_path):
    path = tmp_path / ("records" if renamed else name)
    path.write_bytes(PACKINGS[name](as_text(lines(300))))
    assert run_import("requests", path).sequences == 300
    assert [found.sequence_key for found in load_all(tmp_path / "run")] == [str(n) for n in range(300)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.gz", lambda text: gzip.compress(text)[:-50], "damaged or cut off after line"),
        ("cut.zst", lambda text: zstandard.compress(text)[:-50], "damaged or cut off after line"),
        ("torn.zst", lambda text: zstandard.compress(text)[:-50] + b"\0" * 50, "damaged or cut off"),
        ("plain.gz", lambda text: text, r"is named \.gz but holds no gzip"),
        ("gzip.zst", gzip.compress, r"is named \.zst but holds no zstd"),
    ],
)
def test_damaged_or_misnamed_files_are_refused_with_nothing_written(
    name, content, message, lines, run_import, tmp_path
):
    (tmp_path / name).write_bytes(content(as_text(lines(300))))
    with pytest.raises(ConfigurationError, match=message):
        run_import("requests", tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_what_is_no_plain_file_is_refused(run_import, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "."):
        with pytest.raises(ConfigurationError, match="no such plain file; --format requests reads nothing else"):
            run_import("requests", tmp_path / name)
    with pytest.raises(ConfigurationError, match="no such folder of layer files"):
        run_import("flame", tmp_path / "none", sequence_length=5)


def test_a_file_named_twice_is_refused(lines, run_import, save_lines, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", lines(2))
    with pytest.raises(ConfigurationError, match=r"a\.jsonl: is named 2 times; name it once"):
        run_import("requests", path, tmp_path / "." / "a.jsonl")


def test_a_used_folder_is_refused_before_anything_is_read(lines, run_import, save_lines, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", lines(2))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigurationError, match="used: "):
            run_import("requests", path, output_dir=tmp_path / "used", resume=resume)


def test_where_nothing_can_be_used_nothing_is_written_and_the_reasons_are_counted(
    lines, run_import, save_lines, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", lines(KEPT_PLACES + 5))
    result = run_import("requests", path, num_experts=3)
    assert (result.spec, result.sequences, result.shards) == (None, 0, 0)
    facts = result.dropped.facts()["expert id out of range"]
    assert (facts["count"], len(facts["places"])) == (KEPT_PLACES + 5, KEPT_PLACES)
    assert str(result.dropped) == f"{KEPT_PLACES + 5} expert id out of range"
    assert not (tmp_path / "run").exists()


def test_an_empty_file_gives_nothing(run_import, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    for record_format in ("requests", "sglang", "records"):
        result = run_import(record_format, tmp_path / "a.jsonl")
        assert (result.spec, result.dropped.total) == (None, 0)


def test_the_plan_and_the_card_say_what_was_left_out(lines, run_import, save_lines, tmp_path):
    paths = [
        save_lines(tmp_path / "a.jsonl", [*lines(2), {"id": 3}]),
        save_lines(tmp_path / "b.jsonl", lines(3)),
    ]
    run_import("requests", *paths, dataset="quiz")
    sources = Plan.load(tmp_path / "run").sources
    assert [(each["name"], each["sequences"], each["tokens"], each["dropped"]) for each in sources] == [
        ("a.jsonl", 2, 8, {"not a record": 1}),
        ("b.jsonl", 3, 12, {}),
    ]
    assert "1 not a record" in (tmp_path / "run" / "README.md").read_text()


def test_a_killed_import_resumes_to_equal_tables_and_keeps_finished_shards(
    lines, run_import, save_lines, load_all, assert_equal, tmp_path
):
    path = save_lines(tmp_path / "a.jsonl", [*lines(20), {"broken": 1}])
    whole = run_import("requests", path, shard_size_mb=0.0001, output_dir=tmp_path / "whole")
    assert whole.shards > 5
    run_import("requests", path, shard_size_mb=0.0001)
    run = tmp_path / "run"
    manifest = (run / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (run / "manifest.jsonl").write_bytes(b"".join(manifest[:3]) + manifest[3][:20])  # killed while shard 3 was listed
    for shard in sorted((run / "data").iterdir())[4:]:
        shard.unlink()
    finished = {line.shard: (run / "data" / line.shard).stat().st_mtime_ns for line in read_manifest(run)}
    result = run_import("requests", path, shard_size_mb=0.0001, resume=True)
    assert (result.sequences, result.dropped.facts()) == (20, whole.dropped.facts())
    assert {name: (run / "data" / name).stat().st_mtime_ns for name in finished} == finished
    assert_equal(load_all(run), load_all(tmp_path / "whole"))
    assert verify(run) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 32}, "num_experts was 16, is 32"),
        ({"phase": "decode"}, "phase was 'prefill', is 'decode'"),
        ({"moe_layers": (1, 2)}, "moe_layers was None, is '1-2'"),
        ({"model_name": "other"}, "model_name was 'm', is 'other'"),
        ({"text": "changed"}, "sources was "),
    ],
)
def test_a_resumed_import_must_be_the_same(changes, message, lines, run_import, save_lines, tmp_path):
    path = save_lines(tmp_path / "a.jsonl", lines(3))
    run_import("requests", path)
    if "text" in changes:
        save_lines(path, lines(4))
    settings = {name: value for name, value in changes.items() if name != "text"}
    with pytest.raises(ConfigurationError, match=message):
        run_import("requests", path, resume=True, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "--num_experts 0: must be in 1..65535"),
        ({"top_k": 17}, "--top_k 17: exceeds --num_experts 16"),
        ({"phase": "warm"}, "--phase warm: must be one of prefill, decode"),
        ({"shard_size_mb": float("nan")}, "--shard_size_mb nan: must be above 0"),
        ({"moe_layers": (2, 1)}, "--moe_layers 2,1: must rise"),
        ({"moe_layers": (1, 5), "num_layers": 4}, "--moe_layers 1,5: names 2 layers up to 5, but --num_layers is 4"),
        ({"fields": {"layer": "l"}}, "--field is for the format records, not for requests"),
        ({"sequence_length": 8}, "--sequence_length is for the format flame"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message, run_import, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        run_import("requests", tmp_path / "a.jsonl", **settings)


def test_a_response_file_that_is_cut_off_is_refused(run_import, tmp_path):
    text = json.dumps([{"text": n} for n in range(5000)], indent=1).encode()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text)[:-50])
    with pytest.raises(ConfigurationError, match="damaged or cut off"):
        run_import("sglang", tmp_path / "a.json.gz", num_layers=1, top_k=1)


def test_every_reason_for_leaving_out_is_in_the_manual():
    root = Path(__file__).resolve().parents[3]
    sources = [path.read_text() for path in (root / "traces" / "interchange").glob("*.py")]
    calls = r'(?:Unusable\(\s*|_refuse\(\w+, \w+, |Dropped\(0, where, |problem = )"([^"]+)"'
    raised = {reason for text in sources for reason in re.findall(calls, text)}
    manual = (root / "docs" / "INTERCHANGE.md").read_text()
    assert len(raised) > 20
    assert [reason for reason in raised if f"`{reason}`" not in manual] == []


def test_an_unknown_field_is_refused(run_import, tmp_path):
    with pytest.raises(ConfigurationError, match="--field laier: unknown; choose one of sequence, key, layer"):
        run_import("records", tmp_path / "a.jsonl", fields={"laier": "l"})


@pytest.mark.parametrize("text", ["0", "1-26", "1,3,5-7", "0-2,4,6-9"])
def test_layers_are_spelled_as_numbers_and_ranges(text):
    assert layers_text(parse_layers(text)) == text


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "0-99999999999"])
def test_layers_of_another_spelling_are_refused(text):
    with pytest.raises(ConfigurationError, match="--moe_layers"):
        parse_layers(text)
