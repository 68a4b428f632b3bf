"""Folders made to harm who reads them are refused in one sentence, without being followed, waited for or swelling."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from traces.checksums import checksums
from traces.manifest import MANIFEST_NAME, canonical_json
from traces.plan import PLAN_NAME, SEQUENCES_NAME, SEQUENCES_SCHEMA, fingerprint
from traces.schema import SHARD_KEY, SPEC_KEY

HARNESS = Path(__file__).with_name("hostile_harness.py")
LIMIT = 200 * 2**20  # bytes; the bombs here claim far more
BILLION = 10**9
CARD, SHARD = "README.md", "data/train-00001.parquet"
LENGTHS = [9, 8, 1200, 34, 5, 4]  # two to a shard
TOKENS = 1234
DEEP = b"[" * 200_000


def as_link(name: str, run: Path) -> None:
    """Have the file, which stays sound, somewhere else."""
    (run / name).symlink_to(shutil.move(run / name, run.with_name(f"{run.name} elsewhere")))


def as_device(name: str, run: Path) -> None:
    (run / name).unlink()
    (run / name).symlink_to("/dev/zero")


def as_fifo(name: str, run: Path) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)


def as_folder(name: str, run: Path) -> None:
    (run / name).unlink()
    (run / name).mkdir()


def as_ten_gigabytes(name: str, run: Path) -> None:
    with (run / name).open("r+b") as file:
        file.truncate(10 * BILLION)  # of which the disk holds none


def as_text(name: str, text: bytes, run: Path) -> None:
    (run / name).write_bytes(text)


def forge_line(run: Path, **changes: Any) -> None:
    """Change the second manifest line, whatever it becomes, and its digest with it."""
    lines = (run / MANIFEST_NAME).read_bytes().splitlines(keepends=True)
    values = json.loads(lines[1]) | changes
    del values["digest"]
    values["digest"] = hashlib.blake2b(canonical_json(values), digest_size=16).hexdigest()
    lines[1] = canonical_json(values) + b"\n"
    (run / MANIFEST_NAME).write_bytes(b"".join(lines))


def forge_plan(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change plan.json, and its digests with it."""
    values = json.loads((run / PLAN_NAME).read_bytes())
    del values["digest"]
    values["sequences_sha256"] = hashlib.sha256((run / SEQUENCES_NAME).read_bytes()).hexdigest()
    change(values)
    text = json.dumps(values | {"digest": fingerprint(values)}, sort_keys=True, ensure_ascii=False, indent=1)
    (run / PLAN_NAME).write_bytes(text.encode() + b"\n")


def forge_shard(
    run: Path, change: Callable[[pa.Table], pa.Table] = lambda table: table, **entries: bytes | dict[str, Any]
) -> None:
    """Write the second shard with other columns or entries in its footer, and a manifest line that vouches for it."""
    table = pq.read_table(run / SHARD)
    metadata = dict(table.schema.metadata)
    for key, entry in {SPEC_KEY: entries.get("spec", {}), SHARD_KEY: entries.get("shard", {})}.items():
        metadata[key] = entry if isinstance(entry, bytes) else json.dumps(json.loads(metadata[key]) | entry).encode()
    table = change(table).replace_schema_metadata(metadata)
    pq.write_table(table, run / SHARD, compression="zstd", write_page_checksum=True)
    forge_line(run, **checksums(run / SHARD)._asdict())


def forge_rows(path: Path, rows: int, claimed: int, times: int) -> None:
    """Change the number of rows that a footer claims, first for the file, then for its row group and columns."""

    def integer(value: int) -> bytes:  # Thrift's compact protocol: zigzag, seven bits a byte
        value, out = value << 1, b"\x16"
        while value > 127:
            value, out = value >> 7, out + bytes([value & 127 | 128])
        return out + bytes([value])

    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-8].replace(integer(rows), integer(claimed), times)
    assert footer != content[start:-8]
    path.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def claim_rows(times: int, run: Path) -> None:
    forge_shard(run, shard={"num_tokens": BILLION})
    forge_rows(run / SHARD, TOKENS, BILLION, times)
    forge_line(run, **checksums(run / SHARD)._asdict(), tokens=BILLION)


def claim_footer(length: int, run: Path) -> None:
    (run / SHARD).write_bytes(b"PAR1" + bytes(3 * 2**20) + length.to_bytes(4, "little") + b"PAR1")


def claim_spec(changes: dict[str, Any] | bytes, run: Path) -> None:
    forge_shard(run, spec=changes)


def claim_shard(changes: dict[str, Any] | bytes, run: Path) -> None:
    forge_shard(run, shard=changes)


def repeat_token(length: int, run: Path) -> None:
    """Have the same long token in every row; from 1 MB on, Parquet no longer stores it as a dictionary."""
    token = pa.chunked_array([pa.array(["x" * length])] * TOKENS)
    forge_shard(
        run, lambda table: table.set_column(table.schema.names.index("token"), table.schema.field("token"), token)
    )


def claim_line(changes: dict[str, Any], run: Path) -> None:
    forge_line(run, **changes)


def claim_plan(change: Callable[[dict[str, Any]], Any], run: Path) -> None:
    forge_plan(run, change)


def claim_plan_rows(times: int, run: Path) -> None:
    forge_rows(run / SEQUENCES_NAME, len(LENGTHS), BILLION, times)
    forge_plan(run, lambda plan: plan["shards"][-1].update(stop_sequence=BILLION))


def repeat_key(length: int, run: Path) -> None:
    rows = 3000
    arrays = [
        pa.chunked_array([pa.array(["x" * length])] * rows)
        if pa.types.is_string(field.type)
        else pa.chunked_array([pa.array(np.arange(rows)).cast(field.type)])
        for field in SEQUENCES_SCHEMA
    ]
    pq.write_table(pa.table(arrays, schema=SEQUENCES_SCHEMA), run / SEQUENCES_NAME, compression="zstd")
    forge_plan(run, lambda plan: plan["shards"][-1].update(stop_sequence=rows))


NAMES = (PLAN_NAME, SEQUENCES_NAME, MANIFEST_NAME, CARD, SHARD)
KINDS = (as_link, as_device, as_fifo, as_folder)
UNREAD = {SEQUENCES_NAME, CARD}  # by TraceDataset
HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"{name} {kind.__name__}": (partial(kind, name), name) for name in NAMES for kind in KINDS},
    "data as_link": (partial(as_link, "data"), "data"),
    **{f"{name} of 10 GB": (partial(as_ten_gigabytes, name), name) for name in (PLAN_NAME, MANIFEST_NAME, CARD, SHARD)},
    **{f"{name} deep": (partial(as_text, name, DEEP + b"\n"), name) for name in (PLAN_NAME, MANIFEST_NAME)},
    f"{MANIFEST_NAME} of a line of 2 MB": (
        partial(as_text, MANIFEST_NAME, b'{"a":1' + b" " * 2**21 + b"}\n"),
        MANIFEST_NAME,
    ),
    f"{PLAN_NAME} of a million shards": (
        partial(as_text, PLAN_NAME, b'{"shards":[' + b'{"index":1},' * 2_000_000 + b"]}"),
        PLAN_NAME,
    ),
    "a billion rows": (partial(claim_rows, 1), SHARD),
    "a row group of a billion rows": (partial(claim_rows, -1), SHARD),
    "a footer of 2 MB": (partial(claim_footer, 2 * 2**20), SHARD),
    "a footer longer than its file": (partial(claim_footer, 2**32 - 1), SHARD),
    "a deep spec": (partial(claim_spec, DEEP), SHARD),
    "a deep shard entry": (partial(claim_shard, DEEP), SHARD),
    "a spec that is no object": (partial(claim_spec, b"[1]"), SHARD),
    "a spec of wrong types": (partial(claim_spec, {"model_name": ["x"], "num_layers": 3.0}), SHARD),
    "a spec of many layers": (
        partial(claim_spec, {"num_layers": 65535, "moe_layers": list(range(65535)), "num_experts": 65535}),
        SHARD,
    ),
    "a shard entry of strings": (partial(claim_shard, {"index": "1", "num_tokens": "12345"}), SHARD),
    "a shard entry below 0": (partial(claim_shard, {"first_sequence": -BILLION}), SHARD),
    "a shard entry of far sequences": (partial(claim_shard, {"first_sequence": 2**63, "stop_sequence": 2**63}), SHARD),
    "a shard entry of many sequences": (partial(claim_shard, {"stop_sequence": 2**80}), SHARD),
    "a dictionary of one long token": (partial(repeat_token, 500_000), SHARD),
    "pages of one long token": (partial(repeat_token, 2**20), SHARD),
    **{
        f"a manifest line with {changes}": (partial(claim_line, changes), MANIFEST_NAME)
        for changes in (
            {"shard": "../../../../etc/passwd"},
            {"shard": "/etc/passwd"},
            {"shard": "\x00"},
            {"shard": {"a": 1}},
            {"shard": "\x1b[2J\n"},
            {"index": 10**100},
            {"first_sequence": 2**70, "stop_sequence": 2**70 + 2},
            {"first_sequence": 2**40, "stop_sequence": 2**40 + 2},
            {"index": -1},
            {"index": "1"},
            {"index": True},
            {"tokens": 1e300},
            {"sequences": None},
            {"chunk_crc32": 5},
            {"chunk_crc32": [["a"]]},
            {"notes": "none"},
            {"notes": [["x"]]},
            {"seconds": "1"},
            {"extra": 1},
        )
    },
    "plan.parquet of a billion rows": (partial(claim_plan_rows, 1), SEQUENCES_NAME),
    "plan.parquet with a row group of a billion rows": (partial(claim_plan_rows, -1), SEQUENCES_NAME),
    "plan.parquet with a dictionary of one long key": (partial(repeat_key, 100_000), SEQUENCES_NAME),
    "plan.parquet with pages of one long key": (partial(repeat_key, 2**20), SEQUENCES_NAME),
    **{
        f"a plan with {name}": (partial(claim_plan, change), PLAN_NAME)
        for name, change in {
            "no spec": lambda plan: plan.pop("spec"),
            "a list for a spec": lambda plan: plan.update(spec=[]),
            "a spec of another type": lambda plan: plan["spec"].update(seed="0"),
            "an unknown spec field": lambda plan: plan["spec"].update(path="../.."),
            "settings that are none": lambda plan: plan.update(settings=3),
            "sources that are none": lambda plan: plan.update(sources=[1, 2]),
            "a number of shards": lambda plan: plan.update(shards=BILLION),
            "shards of floats": lambda plan: plan["shards"][0].update(num_tokens=17.0),
            "shards that overlap": lambda plan: plan["shards"][1].update(first_sequence=1),
            "a shard below 0": lambda plan: plan["shards"][0].update(first_sequence=-1),
            "a line break for a fingerprint": lambda plan: plan.update(fingerprint="\n-->\n"),
        }.items()
    },
}


def in_a_child(*arguments: object) -> str:
    """Return what the harness printed; a FIFO, waited for, would run into the time limit."""
    command = [sys.executable, str(HARNESS), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, make_spec, make_sequences, write_run) -> dict[str, dict[str, Any]]:
    """Return what became of each folder, all opened by one process."""
    folder = tmp_path_factory.mktemp("hostile")
    spec = make_spec()
    write_run(folder / "sound", spec, make_sequences(spec, LENGTHS), shards=3)
    runs = []
    for number, (harm, _) in enumerate(HARMS.values()):
        runs.append(folder / str(number))
        shutil.copytree(folder / "sound", runs[-1])
        harm(runs[-1])
    lines = in_a_child(folder / "sound", *runs).splitlines()
    return dict(zip(HARMS, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", HARMS)
def test_hostile_folder_is_refused_in_one_sentence_by_verify_and_reader(outcomes, name):
    outcome, file = outcomes[name], HARMS[name][1]
    assert "crash" not in outcome, outcome["crash"]
    assert outcome["verify"]
    assert any(f"/{file}: " in fault and "; " in fault for fault in outcome["verify"]), outcome["verify"]
    refusals = [*outcome["verify"], *([outcome["read"]] if outcome["read"] else [])]
    assert all(refusal.isprintable() and len(refusal) < 2000 for refusal in refusals)
    assert outcome["read"] or file in UNREAD or name.startswith("a plan with"), "was read without a word"
    assert outcome["grown"] < LIMIT


def test_damaged_footers_and_pages_raise_nothing_but_our_errors(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec(store=("weights", "logits", "lookahead"), horizons=1)
    write_run(tmp_path / "run", spec, make_sequences(spec, [5, 4, 7, 3]), row_group_tokens=10)
    shutil.copytree(tmp_path / "run" / "data", tmp_path / "bare")  # no manifest to notice it first
    found = json.loads(in_a_child("--damage", tmp_path / "bare" / "train-00000.parquet", 300))
    assert found["refused"] > 250  # the rest: statistics of pages and names of programs, which nothing here reads
    assert found["grown"] < LIMIT
