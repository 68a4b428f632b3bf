"""A sound run has no fault; whatever is changed, removed, doubled or exchanged in it is named with file and remedy."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.card import CARD_NAME, EDITED, sealed_card, sealed_facts
from traces.checksums import checksums
from traces.manifest import MANIFEST_NAME, parse_lines, read_manifest
from traces.plan import PLAN_NAME, SEQUENCES_NAME, Plan, parse_plan
from traces.reader import TraceDataset
from traces.shard_check import shard_fault
from traces.verify import verify

SHARDS = [f"data/train-0000{index}.parquet" for index in range(3)]
FILES = [PLAN_NAME, SEQUENCES_NAME, MANIFEST_NAME, CARD_NAME, *SHARDS]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, make_spec, make_sequences, write_run) -> Path:
    """A run of 3 shards, two row groups in each."""
    folder = tmp_path_factory.mktemp("sound")
    spec = make_spec(store=("weights", "lookahead"), horizons=1)
    write_run(folder, spec, make_sequences(spec, [9, 8, 7, 6, 5, 4]), shards=3, row_group_tokens=9)
    return folder


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def named(run: Path) -> dict[str, str]:
    """Return file -> its first problem, with the path seen from the run folder."""
    result: dict[str, str] = {}
    for fault in verify(run):
        assert fault.remedy
        assert str(fault) == f"{fault.path}: {fault.problem}; {fault.remedy}"
        result.setdefault(str(fault.path.relative_to(run)), fault.problem)
    return result


def flipped(content: bytes) -> Iterator[bytes]:
    """Yield the content with each of its bits flipped in turn."""
    changed = bytearray(content)
    for place in range(len(content)):
        for bit in range(8):
            changed[place] ^= 1 << bit
            yield bytes(changed)
            changed[place] ^= 1 << bit


def test_sound_run_has_no_fault_from_either_folder(sound):
    assert verify(sound) == verify(sound / "data") == []


def test_run_is_known_as_one_from_within_and_through_a_link_to_it(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run)
    (run / SHARDS[2]).rename(run / "data" / "train-00007.parquet")
    for folder, name in {run / "data": ".", tmp_path: "link", run: "data", run / "data" / "..": "."}.items():
        monkeypatch.chdir(folder)
        problems = {fault.path.name: fault.problem for fault in verify(Path(name))}
        assert problems["train-00002.parquet"] == "missing, but the manifest lists it"
        with pytest.raises(ConfigurationError, match=r"train-00002\.parquet: missing, but the manifest lists it"):
            TraceDataset(Path(name))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ConfigurationError, match="loop: missing"):
        verify(loop)


def test_what_the_system_does_not_let_us_read_is_not_proven_wrong(tmp_path):
    fault = shard_fault(tmp_path / ("x" * 300), None, None)
    assert fault is not None
    assert not fault.proven
    assert fault.problem == "can not be read (File name too long)"


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_single_flipped_bits_are_named_at_each_of_several_files(sound, tmp_path_factory, data):
    """Some 300 flips; of files that vouch for each other, one is flipped at a time."""
    run = Path(shutil.copytree(sound, tmp_path_factory.mktemp("flipped") / "run"))
    names = [CARD_NAME, data.draw(st.sampled_from([PLAN_NAME, SEQUENCES_NAME]))]
    names += data.draw(st.sampled_from([[MANIFEST_NAME], SHARDS]))
    for name in names:
        content = bytearray((run / name).read_bytes())
        bit = data.draw(st.integers(0, len(content) * 8 - 1), name)
        content[bit // 8] ^= 1 << bit % 8
        (run / name).write_bytes(content)
    assert set(names) <= named(run).keys()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_cut_lengthened_overwritten_and_missing_files_are_noticed(sound, tmp_path_factory, data):
    run = Path(shutil.copytree(sound, tmp_path_factory.mktemp("damaged") / "run"))
    path = run / data.draw(st.sampled_from(FILES))
    before = path.read_bytes()
    start = data.draw(st.integers(0, len(before) - 1))
    stop = data.draw(st.integers(start, len(before)))
    other = data.draw(st.binary(max_size=20))
    path.write_bytes(before[:start] + other + before[stop:])
    assert (path.read_bytes() == before) == (verify(run) == [])
    path.unlink()
    assert named(run)


def test_every_single_bit_of_plan_manifest_and_card_counts(sound):
    for text in flipped((sound / PLAN_NAME).read_bytes()):
        with pytest.raises((ValueError, AttributeError)):
            parse_plan(text)
    for text in flipped((sound / MANIFEST_NAME).read_bytes()):
        lines, torn = parse_lines(text)
        assert torn or None in lines
    assert all(sealed_facts(text) is None for text in flipped((sound / CARD_NAME).read_bytes()))


def test_bits_all_over_the_parquet_files_count(sound, tmp_path):
    plan, line = Plan.load(sound), next(line for line in read_manifest(sound) if line.index == 1)
    path = tmp_path / line.shard
    for number, content in enumerate(flipped((sound / SHARDS[1]).read_bytes())):
        if number % 25 == 0:  # every third byte, each of its bits in turn
            path.write_bytes(content)
            assert shard_fault(path, line, plan) is not None, number
    shutil.copy(sound / PLAN_NAME, tmp_path)
    for number, content in enumerate(flipped((sound / SEQUENCES_NAME).read_bytes())):
        if number % 25 == 0:  # every third byte, each of its bits in turn
            (tmp_path / SEQUENCES_NAME).write_bytes(content)
            with pytest.raises(ConfigurationError, match=SEQUENCES_NAME):
                Plan.load(tmp_path)


def test_truncated_deleted_doubled_and_swapped_shards_are_named(run):
    one, two, three = (run / name for name in SHARDS)
    content = one.read_bytes()
    one.write_bytes(content[:-20])
    assert "bytes, its manifest line says" in named(run)[SHARDS[0]]
    one.unlink()
    assert named(run) == {SHARDS[0]: "missing, but the manifest lists it"}
    one.write_bytes(content)
    for extra in ("train-00003.parquet", "train-00000 (copy).parquet", ".train-00000.parquet"):
        (run / "data" / extra).write_bytes(content)
        assert named(run).keys() == {f"data/{extra}"}
        (run / "data" / extra).unlink()
    two.rename(run / "spare")
    three.rename(two)
    (run / "spare").rename(three)
    assert named(run).keys() == {SHARDS[1], SHARDS[2]}


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a shard again with other rows, with the statistics and page checksums that belong to them."""
    pq.write_table(change(pq.read_table(path)), path, compression="zstd", write_page_checksum=True)


def list_again(run: Path, name: str, **changes: Any) -> None:
    """Have the manifest vouch for a shard as it is now."""
    line = next(line for line in read_manifest(run) if line.shard == Path(name).name)
    forged = replace(line, **checksums(run / name)._asdict() | changes)
    (run / MANIFEST_NAME).write_bytes((run / MANIFEST_NAME).read_bytes().replace(line.render(), forged.render()))


def with_values(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    field = table.schema.field(name)
    column = pa.array(values.reshape(-1)).cast(getattr(field.type, "value_type", field.type))
    if pa.types.is_fixed_size_list(field.type):
        column = pa.FixedSizeListArray.from_arrays(column, type=field.type)
    return table.set_column(table.schema.names.index(name), field, column)


def changed(name: str, row: int, column: int | slice, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = np.stack(table[name].to_numpy()).copy()
        values.reshape(len(values), -1)[row, column] = value
        return with_values(table, name, values)

    return change


WRONG_ROWS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "row group 0: token 3, layer 1: an expert twice: ids [5, 5]": changed("expert_ids", 3, slice(2, 4), 5),
    "row group 0: token 0, layer 2: an expert id of E or more": changed("expert_ids", 0, 5, 8),
    "row group 0: token 1, layer 0: a weight that is not finite": changed("routing_weights", 1, 1, np.nan),
    "row group 0: token 2, layer 1: weights that rise": changed("routing_weights", 2, slice(2, 4), (0.25, 0.75)),
    "row group 0: token 4, layer 1: weights that do not sum to 1": changed("routing_weights", 4, slice(2, 4), 0.25),
    "row group 0: lookahead_logits holds values that are not finite": changed("lookahead_logits", 1, 20, np.inf),
    "row group 0: lookahead_logits are not zero where a layer has no source": changed("lookahead_logits", 1, 0, 1),
    "row group 0: a phase that is none of": changed("phase", 1, 0, 2),
    "row group 0: sequence 2 is not the planned one": lambda table: table.set_column(
        2,
        table.schema.field(2),
        pa.DictionaryArray.from_arrays(pa.array([0] * 7 + [1] * 6, pa.int32()), pa.array(["row-3", "row-2"])),
    ),
    "row group 0 does not hold whole sequences from 2 on": changed("position", 1, 0, 5),
    "not a sound shard (12 rows where its footer plans 13)": lambda table: table.slice(0, 12),
    "not a sound shard (it has column": lambda table: table.drop_columns("token"),
}


@pytest.mark.parametrize("problem", WRONG_ROWS)
def test_wrong_rows_behind_right_checksums_are_found(run, problem):
    """A faulty writer's shard: everything agrees but the values."""
    rewrite(run / SHARDS[1], WRONG_ROWS[problem])
    list_again(run, SHARDS[1])
    assert named(run).keys() == {SHARDS[1]}
    assert named(run)[SHARDS[1]].startswith(problem)


def test_edited_value_is_found_even_where_page_checksums_fit(run):
    rewrite(run / SHARDS[1], changed("expert_ids", 0, slice(0, 2), (6, 7)))
    assert "manifest line" in named(run)[SHARDS[1]]


def test_each_checksum_of_a_line_is_compared(run):
    chunks = checksums(run / SHARDS[1]).chunk_crc32
    for changes, problem in {
        ("sha256", "0" * 64): "its sha256 differs from its manifest line",
        ("footer_blake2b", "0" * 32): "not a sound shard (its size or footer differs from its manifest line)",
        ("chunk_crc32", ((*chunks[0][:-1], 0), *chunks[1:])): "differs from the checksum in the manifest",
        ("chunk_crc32", chunks[:-1]): "its manifest line has checksums of other row groups",
    }.items():
        list_again(run, SHARDS[1], **dict([changes]))
        assert problem in named(run)[SHARDS[1]]


def test_bytes_that_belong_to_no_column_are_found_without_a_manifest(run):
    (run / MANIFEST_NAME).unlink()
    path = run / SHARDS[0]
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for changed_content, problem in {
        content[:footer] + b"hidden" + content[footer:]: "belong to no column",
        b"PARX" + content[4:]: "does not begin as Parquet does",
    }.items():
        path.write_bytes(changed_content)
        assert problem in named(run)[SHARDS[0]]


def test_statistics_that_do_not_fit_the_values_are_found(run):
    (run / MANIFEST_NAME).unlink()
    path = run / SHARDS[0]
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:footer] + content[footer:].replace(b"books", b"bookz"))
    assert named(run)[SHARDS[0]] == "row group 0: dataset is not within its statistics in the footer"


def test_manifest_lines_removed_doubled_torn_or_of_another_run_are_named(run, make_spec, make_sequences, write_run):
    manifest = run / MANIFEST_NAME
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]))
    assert named(run) == {SHARDS[2]: "not in the manifest"}
    manifest.write_bytes(b"".join(lines) + lines[0])
    assert named(run) == {MANIFEST_NAME: "line 4 lists train-00000.parquet a second time"}
    manifest.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    assert named(run) == {MANIFEST_NAME: "line 3 is torn", SHARDS[2]: "not in the manifest"}
    manifest.unlink()
    assert named(run) == {MANIFEST_NAME: "missing"}
    manifest.write_bytes(b"".join(reversed(lines)))  # shards may be finished in any order
    assert named(run) == {}
    spec = make_spec(store=("weights", "lookahead"), horizons=1)
    write_run(run.with_name("other"), spec, make_sequences(spec, [9, 8, 7, 6, 5, 4]), shards=6)
    manifest.write_bytes((run.with_name("other") / MANIFEST_NAME).read_bytes())
    problems = [fault.problem for fault in verify(run)]
    assert "line 1 gives train-00000.parquet a range that is not the planned one" in problems
    assert "line 4 lists train-00003.parquet, which is not planned" in problems


def test_run_that_is_not_finished_is_said_in_one_line(run):
    manifest = run / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().splitlines(keepends=True)[0])
    for name in (*SHARDS[1:], CARD_NAME):
        (run / name).unlink()
    assert named(run) == {".": "2 of 3 planned shards are not there yet"}
    shutil.rmtree(run / "data")
    manifest.unlink()
    assert named(run) == {".": "3 of 3 planned shards are not there yet"}


def test_what_does_not_belong_into_data_is_named(run, tmp_path):
    (run / "data" / "notes.txt").write_text("mine")
    (run / "data" / "folder").mkdir()
    (run / "data" / "link.parquet").symlink_to(tmp_path)
    (run / "data" / "a\x1b[2J\n").write_text("x")
    problems = {f"data/{name}" for name in ("notes.txt", "folder", "link.parquet", "a\x1b[2J\n")}
    assert named_raw(run) == dict.fromkeys(problems, "no shard, and nothing else belongs in data/")
    assert all(str(fault).isprintable() for fault in verify(run))


def named_raw(run: Path) -> dict[str, str]:
    return {str(fault.path.relative_to(run)): fault.problem for fault in verify(run)}


def test_card_missing_changed_or_out_of_date_is_named_and_one_marked_as_edited_is_left_alone(run):
    card = run / CARD_NAME
    text = card.read_text()
    card.unlink()
    assert named(run) == {CARD_NAME: "missing"}
    card.write_text(text.replace("Which experts", "Whose experts"))
    assert named(run) == {CARD_NAME: "was changed: it differs from its own digest"}
    card.write_text("")
    assert named(run) == {CARD_NAME: "was changed: it differs from its own digest"}
    card.write_text(f"# My own words\n\n{EDITED}\n\n")
    assert named(run) == {}
    card.write_bytes(sealed_card(Plan.load(run), read_manifest(run)[:2]))
    problem = named(run)[CARD_NAME]
    assert "2 shards, 4 sequences, 30 tokens, 0 notes', wanted" in problem
    assert "3 shards, 6 sequences, 39 tokens, 0 notes'" in problem


def test_bare_shards_are_checked_for_what_they_are(run, tmp_path, make_spec, make_sequences, write_run):
    bare = Path(shutil.copytree(run / "data", tmp_path / "bare"))
    (bare / "notes.txt").write_text("mine")
    assert verify(bare) == []
    rewrite(bare / "train-00001.parquet", changed("expert_ids", 3, slice(2, 4), 5))
    other = make_spec(quantization="nf4", store=("weights", "lookahead"), horizons=1)
    write_run(tmp_path / "other", other, make_sequences(other, [9, 8, 7, 6, 5, 4]), shards=3)
    shutil.copy(tmp_path / "other" / SHARDS[2], bare)
    found = {fault.path.name: fault.problem for fault in verify(bare)}
    assert found == {
        "train-00001.parquet": "row group 0: token 3, layer 1: an expert twice: ids [5, 5], weights "
        + found["train-00001.parquet"].partition("weights ")[2],
        "train-00002.parquet": "its footer is of another run than that of train-00000.parquet",
    }


def test_folder_without_anything_is_a_wrong_call(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no \.parquet shards"):
        verify(tmp_path)
    with pytest.raises(ConfigurationError, match="missing, wanted a trace folder"):
        verify(tmp_path / "none")
