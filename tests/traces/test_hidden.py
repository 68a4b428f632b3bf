"""Router inputs of a fraction of the tokens: stored, read back and verified like everything else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from groundwork.errors import ExpertSpeculationError
from traces.manifest import MANIFEST_NAME
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec, decoded_bytes_per_token
from traces.verify import verify

WIDTH, EVERY = 20, 4
Run = tuple[Path, TraceSpec, list[SequenceTrace]]


@pytest.fixture
def run(tmp_path: Path, make_spec: Callable, make_sequences: Callable, write_run: Callable) -> Run:
    spec = make_spec(store=("weights", "hidden"), hidden_size=WIDTH, hidden_fraction=1 / EVERY)
    sequences = sampled(make_sequences(spec, [3, 9, 1, 14, 2, 2]))
    write_run(tmp_path / "run", spec, sequences, shards=2, row_group_tokens=12)
    return tmp_path / "run", spec, sequences


def sampled(sequences: list[SequenceTrace]) -> list[SequenceTrace]:
    """Give every fourth token of the run its router inputs, so that one sequence has none."""
    generator, first, result = np.random.default_rng(0), 0, []
    for each in sequences:
        places = np.flatnonzero(np.arange(first, first + each.num_tokens) % EVERY == 1)
        values = generator.normal(size=(len(places), 3, WIDTH)).astype(np.float16)
        result.append(replace(each, hidden_positions_N=places, router_input_NLD=values))
        first += each.num_tokens
    return result


def test_they_are_read_back_where_they_are_asked_for(run: Run) -> None:
    run_dir, spec, sequences = run
    assert verify(run_dir) == []
    dataset = TraceDataset(run_dir)
    assert "hidden" in dataset.available
    assert any(len(each.hidden_positions_N) == 0 for each in sequences)
    found = {each.sequence_id: each for each in dataset.sequences(columns=("hidden",), shuffle_seed=1)}
    for wanted in sequences:
        assert np.array_equal(found[wanted.sequence_id].hidden_positions_N, wanted.hidden_positions_N)
        assert np.array_equal(found[wanted.sequence_id].router_input_NLD, wanted.router_input_NLD)
    (last,) = [each for each in dataset.sequences(columns=("hidden",), layers=[2, 0]) if each.sequence_id == 3]
    assert np.array_equal(last.router_input_NLD, sequences[3].router_input_NLD[:, [2, 0]])
    assert all(each.router_input_NLD is None for each in dataset.sequences(columns=("weights",)))
    dataset.read([3])[0].check(spec)


def test_other_programs_read_bytes_and_nulls(run: Run) -> None:
    run_dir, _, sequences = run
    column = pq.read_table(run_dir / "data" / "train-00000.parquet")["router_input"].to_pylist()
    own = sequences[0].router_input_NLD
    assert own is not None
    assert [value is not None for value in column[:3]] == [False, True, False]
    assert np.array_equal(np.frombuffer(column[1], "<f2").reshape(3, WIDTH), own[0])


def test_a_row_group_takes_no_more_memory_than_any_other(make_spec: Callable) -> None:
    """A token of Mixtral-8x7B has 256 KiB of router inputs; a hundredth of the tokens, a hundredth of that each."""
    spec = make_spec(num_layers=32, moe_layers=tuple(range(32)))
    hidden = replace(spec, store=("weights", "hidden"), hidden_size=4096, hidden_fraction=0.01)
    assert 2621 < decoded_bytes_per_token(hidden) - decoded_bytes_per_token(spec) < 2640


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_positions_N": np.array([1, 1])}, r"hidden_positions_N \[1, 1\] do not rise from 0 below 9"),
        ({"hidden_positions_N": np.array([1, 9])}, r"do not rise from 0 below 9"),
        ({"hidden_positions_N": np.array([1])}, r"float16 \(2, 3, 20\), wanted float16 \(1, 3, 20\)"),
        (
            {"router_input_NLD": np.full((2, 3, WIDTH), np.inf, np.float16)},
            "router_input_NLD: 120 values are not finite",
        ),
        ({"router_input_NLD": None}, "router_input_NLD is missing"),
    ],
)
def test_what_can_not_be_is_refused(run: Run, changes: dict, message: str) -> None:
    _, spec, sequences = run
    sequences[1].check(spec)
    with pytest.raises(ValueError, match=message):
        replace(sequences[1], **changes).check(spec)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 0}, {"hidden_fraction": 0.0}, {"hidden_fraction": 1.5}, {"store": ("weights",)}],
)
def test_a_spec_that_contradicts_itself_is_refused(run: Run, changes: dict) -> None:
    with pytest.raises(ValueError, match=r"hidden_size .* do not fit store"):
        replace(run[1], **changes)


class Unchecked(SequenceTrace):
    """A sequence that a faulty writer would store."""

    def check(self, spec: TraceSpec) -> None:
        pass


@pytest.mark.parametrize(
    ("places", "shape", "value", "message"),
    [
        ([1, 5], (2, 3, WIDTH - 1), 0.0, "a router_input that is not of 3 layers and 20 numbers"),
        ([1, 5], (2, 3, WIDTH), np.nan, "router_input holds values that are not finite"),
        ([1, 2, 3, 5, 8], (5, 3, WIDTH), 0.0, "5 of 9 tokens have a router_input, wanted 0.25 of them"),
        ([], (0, 3, WIDTH), 0.0, "0 of 9 tokens have a router_input, wanted 0.25 of them"),
    ],
)
def test_verify_finds_what_a_faulty_writer_stored(
    tmp_path: Path, run: Run, write_run: Callable, places: list[int], shape: tuple, value: float, message: str
) -> None:
    _, spec, sequences = run
    values = np.full(shape, value, np.float16)
    own = vars(sequences[1]) | {
        "sequence_id": 0,
        "hidden_positions_N": np.array(places, int),
        "router_input_NLD": values,
    }
    write_run(tmp_path / "faulty", spec, [Unchecked(**own)])
    (fault,) = verify(tmp_path / "faulty")
    assert message in str(fault)


def test_bytes_that_stand_for_many_are_refused(tmp_path: Path, run: Run) -> None:
    """A dictionary would let a small file decode to any size."""
    run_dir, _, _ = run
    path = run_dir / "data" / "train-00001.parquet"
    file = pq.ParquetFile(path)
    table, metadata = file.read(), file.schema_arrow.metadata
    options = {"use_dictionary": ["router_input"], "write_statistics": False}
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)
    (run_dir / MANIFEST_NAME).unlink()
    assert any("where only plain values belong" in str(fault) for fault in verify(run_dir))
    bare = path.rename(tmp_path / path.name).parent
    with pytest.raises(ExpertSpeculationError, match="only plain values belong"):
        list(TraceDataset(bare).sequences(columns=("hidden",)))
