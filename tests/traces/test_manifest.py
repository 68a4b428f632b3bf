"""Manifest lines read back as written, and any change to one is noticed; test_crash.py tears the last one."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.manifest import MANIFEST_NAME, ManifestLine, append_line, parse_lines, parse_manifest, read_manifest


def line(index: int, **changes) -> ManifestLine:
    values = {"shard": f"train-{index:05d}.parquet", "index": index, "first_sequence": 10 * index, "seconds": 1.5}
    values |= {"stop_sequence": 10 * index + 10, "sequences": 10, "tokens": 99, "bytes": 1234, "sha256": "ab" * 32}
    values |= {"footer_blake2b": "cd" * 16, "chunk_crc32": ((1, 2**32 - 1), (0, 5))}
    return ManifestLine(**values | changes)


def test_lines_read_back_in_order(tmp_path):
    assert read_manifest(tmp_path) == []
    lines = [line(0), line(2, notes=("a batch was split by out-of-memory", "ä\n")), line(1)]
    for each in lines:
        append_line(tmp_path, each)
    assert read_manifest(tmp_path) == lines


@given(st.data())
def test_every_single_bit_flip_is_noticed(data):
    text = line(3, notes=("note",)).render()
    bit = data.draw(st.integers(0, len(text) * 8 - 1))
    flipped = bytearray(text)
    flipped[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_NAME).write_bytes(flipped)
        lines, torn = parse_manifest(Path(folder))
    assert torn or None in lines


def test_damaged_middle_line_is_named(tmp_path):
    append_line(tmp_path, line(0))
    append_line(tmp_path, line(1))
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b"1234", b"1235", 1))
    with pytest.raises(
        ConfigurationError, match=r"manifest.jsonl: line 1 is not as it was written, by its own digest; run"
    ):
        read_manifest(tmp_path)


def test_line_that_would_be_too_long_to_be_read_back_is_not_written(tmp_path):
    append_line(tmp_path, line(0))
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    with pytest.raises(ConfigurationError, match=r"train-00001\.parquet has too many row groups .*--shard_size_mb"):
        append_line(tmp_path, line(1, chunk_crc32=((2**32 - 1,) * 9,) * 12_000))
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": "train-00004.parquet"},
        {"stop_sequence": 41},
        {"sequences": 0, "stop_sequence": 30},
        {"tokens": 9},
        {"bytes": -1},
        {"sha256": None},
        {"seconds": None},
        {"notes": (1,)},
        {"chunk_crc32": ((1.5,),)},
    ],
    ids=str,
)
def test_line_that_can_not_be_true_is_no_line_whatever_its_digest(changes):
    good, bad = line(3), line(3, **changes)
    assert parse_lines(good.render() + bad.render()) == ([good, None], False)
