"""Shards hold exactly what was written, in bounded row groups of whole sequences; test_crash.py interrupts them."""

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from groundwork.errors import ConfigurationError
from traces.manifest import read_manifest
from traces.plan import PlannedShard
from traces.schema import SequenceTrace, arrow_schema, decoded_bytes_per_token
from traces.writer import ROW_GROUP_BYTES, ShardWriter, lock_run, to_table


def long(sequence: SequenceTrace, tokens: int) -> SequenceTrace:
    """Return the sequence with its first token repeated: big arrays without the time to draw them."""
    arrays = {name: value for name, value in vars(sequence).items() if isinstance(value, np.ndarray)}
    repeated = {name: np.repeat(value[:1], tokens, axis=0) for name, value in arrays.items()}
    return replace(sequence, tokens_T=["x"] * tokens, **repeated)


def test_row_groups_hold_whole_sequences_within_the_token_limit(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    sequences = make_sequences(spec, np.random.default_rng(1).integers(1, 60, 80))
    write_run(tmp_path, spec, sequences, row_group_tokens=50)
    seen: set[int] = set()
    with pq.ParquetFile(tmp_path / "data" / "train-00000.parquet") as file:
        assert file.num_row_groups > 10
        for group in range(file.num_row_groups):
            ids = set(file.read_row_group(group, columns=["sequence_id"])["sequence_id"].to_pylist())
            assert not ids & seen
            assert file.metadata.row_group(group).num_rows <= 50 or len(ids) == 1
            seen |= ids
    assert len(seen) == 80


def test_each_distinct_string_stands_in_a_dictionary_once(make_spec, make_sequences):
    """For a repeated one Arrow writes what was in memory before, and equal runs would differ in their bytes."""
    spec = make_spec()
    sequences = [replace(each, dataset="one", sequence_key="key") for each in make_sequences(spec, [3, 2, 4])]
    sequences[1] = replace(sequences[1], dataset="two")
    table = to_table(sequences, spec, arrow_schema(spec))
    assert table["dataset"].to_pylist() == ["one"] * 3 + ["two"] * 2 + ["one"] * 4
    assert table["dataset"].chunk(0).dictionary.to_pylist() == ["one", "two"]
    assert table["sequence_key"].chunk(0).dictionary.to_pylist() == ["key"]


def test_row_groups_stay_within_64_mib_decoded(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec(num_layers=32, num_experts=256, store=("weights", "logits"))
    write_run(tmp_path, spec, [long(each, 1500) for each in make_sequences(spec, [1, 1, 1])])
    metadata = pq.read_metadata(tmp_path / "data" / "train-00000.parquet")
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert rows == [3000, 1500]
    assert max(rows) * decoded_bytes_per_token(spec) <= ROW_GROUP_BYTES < sum(rows) * decoded_bytes_per_token(spec)


def test_sequence_beyond_a_row_group_is_refused_with_a_remedy(tmp_path, make_spec, make_sequences):
    spec = make_spec(num_layers=64, num_experts=256, store=("logits",), weights_normalized=None)
    sequence = long(*make_sequences(spec, [1]), 2100)
    with (
        pytest.raises(ConfigurationError, match=r"2100 tokens, a row group holds .*lower --max_length"),
        ShardWriter(tmp_path, spec, PlannedShard(0, 0, 1, 2100)) as writer,
    ):
        writer.write(sequence)


def test_datasets_and_polars_count_the_manifests_rows(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec(store=("weights", "logits", "lookahead"), horizons=1)
    write_run(tmp_path / "run", spec, make_sequences(spec, [20, 30, 5, 40, 6]), shards=2)
    rows = sum(line.tokens for line in read_manifest(tmp_path / "run"))
    data = tmp_path / "run" / "data"
    loaded = load_dataset("parquet", data_dir=str(data), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == rows == 101
    assert len(loaded[0]["router_logits"]) == spec.num_layers * spec.num_experts
    assert pl.scan_parquet(data / "*.parquet").select(pl.len()).collect().item() == rows


def test_only_shards_stand_in_data_and_nothing_is_left_over(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    write_run(tmp_path, spec, make_sequences(spec, [4, 5, 6]), shards=3)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [f"train-0000{i}.parquet" for i in range(3)]
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_uncommitted_shard_is_discarded(tmp_path, make_spec, make_sequences):
    spec = make_spec()
    with ShardWriter(tmp_path, spec, PlannedShard(0, 0, 2, 9)) as writer:
        writer.write(make_sequences(spec, [4])[0])
        with pytest.raises(ValueError, match="up to 1 with 4 tokens only"):
            writer.commit()
    assert list((tmp_path / "data").iterdir()) == list((tmp_path / ".tmp").iterdir()) == []
    assert read_manifest(tmp_path) == []


def test_sequence_out_of_turn_is_refused(tmp_path, make_spec, make_sequences):
    spec = make_spec()
    first, second, third = make_sequences(spec, [4, 5, 6])
    with ShardWriter(tmp_path, spec, PlannedShard(0, 0, 2, 9)) as writer:
        with pytest.raises(ValueError, match="sequence 1 given where"):
            writer.write(second)
        writer.write(first)
        writer.write(second)
        with pytest.raises(ValueError, match="sequence 2 given where"):
            writer.write(third)


def test_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    with lock_run(tmp_path), pytest.raises(ConfigurationError, match="another process is writing"), lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass


def test_output_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigurationError, match=r"can not be written .*give another --output_dir"),
        lock_run(tmp_path / "file"),
    ):
        pass


def test_what_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in (".tmp", "data"):
        run_dir = tmp_path / f"run{name}"
        run_dir.mkdir()
        (run_dir / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigurationError, match=rf"{name}: a link, wanted a folder"), lock_run(run_dir):
            pass
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".lock").symlink_to(tmp_path / "elsewhere" / "file")
    with pytest.raises(ConfigurationError, match="can not be written"), lock_run(tmp_path / "linked"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
