"""A sound run has no fault; whatever is changed, removed, doubled or exchanged in it is named with file and remedy."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.verify import verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory, make_spec, make_sequences, write_run) -> Path:
    """A run of 3 shards."""
    folder = tmp_path_factory.mktemp("sound")
    spec = make_spec(store=("weights", "lookahead"), horizons=1)
    write_run(folder, spec, make_sequences(spec, [9, 8, 7, 6, 5, 4]), shards=3)
    return folder


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def named(run: Path) -> dict[str, str]:
    """Return file name -> first problem."""
    result: dict[str, str] = {}
    for fault in verify(run):
        assert fault.remedy
        assert str(fault) == f"{fault.path}: {fault.problem}; {fault.remedy}"
        result.setdefault(fault.path.name, fault.problem)
    return result


def test_sound_run_has_no_fault_from_either_folder(sound):
    assert verify(sound) == verify(sound / "data") == []


def test_truncated_deleted_doubled_and_swapped_shards_are_named(run):
    one, two, three = sorted((run / "data").iterdir())
    content = one.read_bytes()
    one.write_bytes(content[:-20])
    assert "bytes, its manifest line says" in named(run)[one.name]
    one.unlink()
    assert named(run) == {one.name: "listed in the manifest but missing"}
    one.write_bytes(content)
    extra = run / "data" / "train-00003.parquet"
    extra.write_bytes(content)
    assert set(named(run)) == {extra.name}
    extra.unlink()
    two.rename(run / "spare")
    three.rename(two)
    (run / "spare").rename(three)
    assert set(named(run)) == {two.name, three.name}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_single_bit_flip_in_any_file_is_named(sound, tmp_path_factory, data):
    names = [MANIFEST_NAME, "plan.json", "plan.parquet", *(f"data/train-0000{i}.parquet" for i in range(3))]
    name = data.draw(st.sampled_from(names))
    content = bytearray((sound / name).read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    run = tmp_path_factory.mktemp("flipped") / "run"
    shutil.copytree(sound, run)
    (run / name).write_bytes(content)
    assert Path(name).name in named(run)


def test_wrong_values_behind_right_checksums_are_found(run, make_spec):
    """A faulty writer's shard: everything agrees but the values."""
    path = run / "data" / "train-00001.parquet"
    table = pq.read_table(path)
    line = next(line for line in read_manifest(run) if line.index == 1)
    ids = np.stack(table["expert_ids"].to_numpy())
    ids[3, 2:4] = [5, 5]
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), type=table.schema.field("expert_ids").type)
    position = table.schema.names.index("expert_ids")
    pq.write_table(table.set_column(position, table.schema.field("expert_ids"), column), path)
    content = path.read_bytes()
    forged = replace(line, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = run / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(line.render(), forged.render()))
    assert named(run)[path.name].startswith("row group 0: token 3, layer 1: an expert twice: ids [5, 5]")


def test_unfinished_run_and_foreign_things_are_named(run, tmp_path):
    manifest = run / MANIFEST_NAME
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    (run / "data" / "notes.txt").write_text("mine")
    (run / "data" / "link.parquet").symlink_to(tmp_path)
    assert named(run) == {
        MANIFEST_NAME: "line 3 is torn",
        "train-00002.parquet": "planned, but not in the manifest",
        "notes.txt": "not a sound shard (Parquet file size is 4 bytes, smaller than the minimum file footer (8 bytes))",
        "link.parquet": "not a plain file",
    }
    manifest.write_bytes(b"".join(lines) + lines[0])
    assert "line 4 lists train-00000.parquet a second time" in named(run)[MANIFEST_NAME]


def test_folder_without_anything_is_a_wrong_call(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no \.parquet shards"):
        verify(tmp_path)
