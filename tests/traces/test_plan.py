"""A plan loads as it was saved or not at all, and shards cut from it cover every sequence once."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.plan import PLAN_LIMIT, Plan, PlannedShard, cut_shards, estimated_bytes_per_token, fingerprint


def test_plan_survives_saving(tmp_path, make_spec, make_sequences, make_plan):
    spec = make_spec()
    plan = make_plan(spec, make_sequences(spec, [3, 4, 5, 6]), shards=2)
    plan.save(tmp_path / "run")
    loaded = Plan.load(tmp_path / "run")
    assert loaded.sequences.equals(plan.sequences)
    assert (loaded.spec, loaded.shards, loaded.settings, loaded.sources) == (
        spec,
        plan.shards,
        plan.settings,
        plan.sources,
    )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_loading_leaves_no_thread_that_could_abort_a_process_about_to_exit(
    tmp_path, make_spec, make_sequences, make_plan
):
    spec = make_spec()
    make_plan(spec, make_sequences(spec, [3, 4])).save(tmp_path)
    program = (
        "import os, sys; from pathlib import Path; from traces.plan import Plan; "
        "count = lambda: len(os.listdir('/proc/self/task')); "
        "before = count(); Plan.load(Path(sys.argv[1])); print(count() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_changed_or_missing_plan_is_refused_by_name(tmp_path, make_spec, make_sequences, make_plan):
    spec = make_spec()
    with pytest.raises(ConfigurationError, match=r"plan\.json: missing"):
        Plan.load(tmp_path)
    make_plan(spec, make_sequences(spec, [3, 4])).save(tmp_path)
    for name in ("plan.json", "plan.parquet"):
        path = tmp_path / name
        sound = path.read_bytes()
        for place in range(0, len(sound), max(len(sound) // 60, 1)):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            with pytest.raises(ConfigurationError, match=r"plan\.(json|parquet): "):
                Plan.load(tmp_path)
        path.write_bytes(sound)
    Plan.load(tmp_path)


def test_plan_with_a_gap_or_a_wrong_count_is_refused(make_spec, make_sequences, make_plan):
    spec = make_spec()
    plan = make_plan(spec, make_sequences(spec, [3, 4, 5, 6]), shards=2)
    first, second = plan.shards
    for shards in (
        [first],
        [second],
        [first, replace(second, num_tokens=1)],
        [first, replace(second, first_sequence=3)],
    ):
        with pytest.raises(ValueError, match="shard"):
            replace(plan, shards=shards)


def test_numbers_that_no_shard_has_are_refused():
    for numbers in ((-1, 0, 1, 1), (0, 0.0, 1, 1), (0, 0, "1", 1), (0, 0, 1, True), (0, 0, 2**33, 1), (0, None, 1, 1)):
        with pytest.raises(ValueError, match="no shard has these numbers"):
            PlannedShard(*numbers)


def test_plan_too_large_to_be_read_back_is_not_written(tmp_path, make_spec, make_sequences, make_plan):
    spec = make_spec()
    plan = make_plan(spec, make_sequences(spec, [3, 4, 5]))
    keys = pa.array(["x" * 30_000_000] * 3)
    long_keys = plan.sequences.set_column(2, plan.sequences.schema.field("sequence_key"), keys)
    for large in (replace(plan, sequences=long_keys), replace(plan, settings={"text": "x" * PLAN_LIMIT})):
        with pytest.raises(ConfigurationError, match=r"the plan is too large to be read back .*--shard_size_mb"):
            large.save(tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_long_keys_of_a_small_plan_are_no_hostility(tmp_path, make_spec, make_sequences, make_plan):
    spec = make_spec()
    plan = make_plan(spec, make_sequences(spec, [3, 4, 5]))
    keys = pa.array(["x" * 1_000_000] * 3)
    plan = replace(plan, sequences=plan.sequences.set_column(2, plan.sequences.schema.field("sequence_key"), keys))
    plan.save(tmp_path)
    assert Plan.load(tmp_path).sequences.equals(plan.sequences)


@given(st.lists(st.integers(1, 5000)), st.floats(0.001, 2))
def test_cut_shards_cover_all_sequences_within_the_size(make_spec, lengths, size_mb):
    spec = make_spec()
    shards = cut_shards(lengths, spec, size_mb)
    covered = [n for shard in shards for n in range(shard.first_sequence, shard.stop_sequence)]
    assert covered == list(range(len(lengths)))
    for shard in shards:
        own = lengths[shard.first_sequence : shard.stop_sequence]
        assert shard.num_tokens == sum(own)
        assert len(own) == 1 or shard.num_tokens * estimated_bytes_per_token(spec) <= size_mb * 1e6


def test_fingerprint_ignores_order_of_keys_only():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
