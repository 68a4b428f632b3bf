"""What is read is what was written, in every split, order and choice of columns; what is no trace is refused."""

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from traces.reader import TraceDataset
from traces.shards import NothingFinishedError
from traces.splits import split_of

ARRAYS = (
    "token_ids_T",
    "phase_T",
    "expert_ids_TLK",
    "routing_weights_TLK",
    "router_logits_TLE",
    "lookahead_logits_THLE",
)
EVERYTHING = ("weights", "logits", "lookahead", "tokens")


def assert_equal(found, written):
    assert (found.dataset, found.sequence_id, found.sequence_key) == (
        written.dataset,
        written.sequence_id,
        written.sequence_key,
    )
    assert found.tokens_T == written.tokens_T
    for name in ARRAYS:
        a, b = getattr(found, name), getattr(written, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape), name


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_run_reads_back_bit_for_bit(make_spec, make_sequences, write_run, data):
    experts = data.draw(st.sampled_from([1, 2, 7, 256, 300]))
    layers = data.draw(st.integers(1, 4))
    store = tuple(data.draw(st.lists(st.sampled_from(EVERYTHING[:3]), unique=True)))
    spec = make_spec(
        num_experts=experts,
        top_k=data.draw(st.integers(1, min(4, experts))),
        num_layers=layers,
        store=store,
        horizons=data.draw(st.integers(1, layers)) if "lookahead" in store else 0,
    )
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    token = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
    sequences = [
        replace(each, tokens_T=[token, *each.tokens_T[1:]], sequence_key=token)
        for each in make_sequences(spec, lengths, seed=data.draw(st.integers(0, 99)))
    ]
    shards = data.draw(st.integers(1, len(lengths)))
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), spec, sequences, shards, row_group_tokens=data.draw(st.integers(1, 100)))
        dataset = TraceDataset(Path(folder) / "data")
        assert (dataset.spec, dataset.num_sequences, dataset.num_tokens) == (spec, len(lengths), sum(lengths))
        assert dataset.available == {"ids", "tokens", *store}
        for found, written in zip(dataset.sequences("all", EVERYTHING), sequences, strict=True):
            assert_equal(found, written)


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_spec, make_sequences, write_run):
    """A run of 200 sequences in 3 shards and many row groups, with what was written."""
    spec = make_spec(store=("weights", "logits"))
    sequences = make_sequences(spec, np.random.default_rng(0).integers(1, 30, 200))
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, spec, sequences, shards=3, row_group_tokens=200)
    return folder, sequences


def test_splits_partition_the_run_as_the_text_says(run):
    dataset, sequences = TraceDataset(run[0]), run[1]
    found = {
        each.sequence_id: split for split in ("train", "validation", "test") for each in dataset.sequences(split, ())
    }
    assert len(found) == 200
    for each in sequences:
        assert split_of(each.token_ids_T, each.tokens_T).startswith(found[each.sequence_id])


def test_shuffled_order_is_a_permutation_and_start_resumes_it(run):
    dataset = TraceDataset(run[0])
    order = [each.sequence_id for each in dataset.sequences("train", (), shuffle_seed=5)]
    plain = [each.sequence_id for each in dataset.sequences("train", ())]
    assert sorted(order) == plain
    assert order != plain
    assert order != [each.sequence_id for each in dataset.sequences("train", (), shuffle_seed=6)]
    for start in (0, 1, 57, len(order) - 1, len(order), len(order) + 9):
        again = TraceDataset(run[0]).sequences("train", (), shuffle_seed=5, start=start)
        assert [each.sequence_id for each in again] == order[start:]
        assert [each.sequence_id for each in dataset.sequences("train", (), start=start)] == plain[start:]


def test_only_the_columns_asked_for_are_read(run):
    first = next(TraceDataset(run[0]).sequences("all", ("logits", "lookahead")))
    assert first.router_logits_TLE is not None
    assert first.routing_weights_TLK is first.lookahead_logits_THLE is None
    assert first.tokens_T == []
    with pytest.raises(ValueError, match="unknown columns"):
        TraceDataset(run[0]).sequences("all", ("gates",))


def test_data_sets_are_held_out_or_chosen_by_name(run):
    dataset = TraceDataset(run[0])
    assert dataset.datasets == ["books", "code", "news"]
    assert Counter(each.dataset for each in dataset.sequences(hold_out=["code"])) == {"books": 67, "news": 66}
    assert {each.dataset for each in dataset.sequences(only=["code"])} == {"code"}
    with pytest.raises(ConfigurationError, match="'poems' is not in these traces; they hold books, code, news"):
        dataset.sequences(hold_out=["poems"])


def test_single_sequences_come_in_the_order_asked_for(run):
    found = TraceDataset(run[0]).read([199, 3, 70, 3])
    assert [each.sequence_id for each in found] == [199, 3, 70, 3]
    for each in found:
        assert_equal(each, run[1][each.sequence_id])
    with pytest.raises(ConfigurationError, match="sequence 200 is not in"):
        TraceDataset(run[0]).read([200])


def test_read_arrays_are_writable_copies(run):
    dataset = TraceDataset(run[0])
    (first,) = dataset.read([0])
    first.expert_ids_TLK[:] = 0
    assert dataset.read([0])[0].expert_ids_TLK.any()


def test_text_that_is_unknown_is_not_available_and_still_split(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    unknown = [
        replace(each, token_ids_T=np.full(5, -1, np.int32), tokens_T=[""] * 5)
        for each in make_sequences(spec, [5] * 100)
    ]
    write_run(tmp_path, spec, unknown)
    dataset = TraceDataset(tmp_path)
    assert dataset.available == {"ids", "weights"}
    assert len({info.split for info in dataset.index}) == 4


def test_what_is_no_trace_folder_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, found in {
        "file": "a file, wanted a trace folder; give",
        "none": "missing",
        "empty": "holds no .parquet",
    }.items():
        with pytest.raises(ConfigurationError, match=f"{name}: {found}"):
            TraceDataset(tmp_path / name)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "empty" / "foreign.parquet")
    with pytest.raises(
        ConfigurationError, match=r"foreign\.parquet: not a sound routing-trace shard \(no routing-trace metadata"
    ):
        TraceDataset(tmp_path / "empty")
    (tmp_path / "empty" / "foreign.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ConfigurationError,
        match=r"foreign\.parquet: not a sound .*collect it again",
    ):
        TraceDataset(tmp_path / "empty")


def test_footers_that_disagree_are_refused_with_field_and_values(tmp_path, make_spec, make_sequences, write_run):
    for name, spec in {"a": make_spec(), "b": make_spec(quantization="nf4")}.items():
        write_run(tmp_path / name, spec, make_sequences(spec, [4, 5]), shards=2)
    shutil.copy(tmp_path / "b/data/train-00001.parquet", tmp_path / "a/data/train-00001.parquet")
    with pytest.raises(ConfigurationError, match=r"train-00001\.parquet: .*footer differs from its manifest line"):
        TraceDataset(tmp_path / "a")
    (tmp_path / "a" / "data").rename(tmp_path / "bare")
    with pytest.raises(
        ConfigurationError, match=r"train-00001\.parquet: quantization is 'nf4', but 'none' in train-00000"
    ):
        TraceDataset(tmp_path / "bare")


def test_renamed_linked_and_damaged_shards_are_refused_by_name(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    path = folder / "data/train-00001.parquet"
    renamed = folder / "data/train-00007.parquet"
    path.rename(renamed)
    with pytest.raises(ConfigurationError, match=r"train-00001\.parquet: missing, but the manifest lists it"):
        TraceDataset(folder)
    path.symlink_to(renamed)
    with pytest.raises(ConfigurationError, match=r"train-00001\.parquet: .*a link"):
        TraceDataset(folder)
    path.unlink()
    content = bytearray(renamed.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ExpertSpeculationError, match=r"train-00001\.parquet: .*run 'expert-speculation verify'"):
        list(TraceDataset(folder).sequences("all", EVERYTHING))
    shutil.copytree(folder / "data", tmp_path / "bare")
    with pytest.raises(ConfigurationError, match=r"train-00007\.parquet: .*its footer is that of train-00001\.parquet"):
        TraceDataset(tmp_path / "bare")


def test_an_expert_that_the_model_does_not_have_is_refused_before_anything_counts_with_it(
    tmp_path, make_spec, make_sequences, write_run
):
    """Bare shards, whose bytes nothing vouches for; of more than 256 experts, so that ids take two bytes."""
    spec = make_spec(num_experts=300)
    write_run(tmp_path / "run", spec, make_sequences(spec, [5, 6]))
    (shard,) = (tmp_path / "run" / "data").glob("*.parquet")
    table = pq.read_table(shard)
    ids = np.stack(table["expert_ids"].to_numpy()).copy()
    ids[-1, -1] = 300
    column = table.schema.names.index("expert_ids")
    values = pa.array(list(ids), table.schema.field(column).type)
    (tmp_path / "bare").mkdir()
    pq.write_table(table.set_column(column, table.schema.field(column), values), tmp_path / "bare" / shard.name)
    with pytest.raises(ExpertSpeculationError, match=rf"{shard.name}: .*expert_ids holds 300, and the model has 300"):
        list(TraceDataset(tmp_path / "bare").sequences())


def test_the_manifest_decides_what_is_read(run, tmp_path, capsys):
    """A run that was killed: a shard in place but not listed is not read, and what is missing is said."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    manifest = folder / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]))
    dataset = TraceDataset(folder)
    assert len(list(dataset.sequences())) == dataset.num_sequences < 200
    said = capsys.readouterr().err
    assert "train-00002.parquet left out, not in the manifest" in said
    assert "2 of 3 planned shards are there; finish the run with --resume" in said
    for damaged, problem in {b"": "lists no finished shard", lines[0] * 2: "lists a shard twice"}.items():
        manifest.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=rf"manifest\.jsonl: {problem}.*--repair"):
            TraceDataset(folder)


def test_a_run_without_a_finished_shard_is_told_from_a_folder_that_is_none(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "data")
    with pytest.raises(ConfigurationError, match=r"run: holds none of the shards that the manifest lists; restore"):
        TraceDataset(folder)
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(NothingFinishedError, match=r"run: none of its 3 planned shards is finished yet; .* --resume$"):
        TraceDataset(folder)
    (folder / "data").mkdir()
    for named in (folder, folder / "data"):
        with pytest.raises(NothingFinishedError) as caught:
            TraceDataset(named)
        assert caught.value.run_dir == folder
    (folder / "plan.json").unlink()
    with pytest.raises(ConfigurationError, match=r"run: a run that has no plan yet; wait for it, or .* --resume$"):
        TraceDataset(folder)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_stream_goes_on_in_another_process_exactly_where_its_state_stands(run, seed):
    stream = TraceDataset(run[0]).sequences("train", (), shuffle_seed=seed)
    order = [each.sequence_id for each in TraceDataset(run[0]).sequences("train", (), shuffle_seed=seed)]
    assert len(stream) == len(order)
    for done in range(len(order) + 1):
        state = json.loads(json.dumps(stream.state_dict()))
        assert (state["position"], state["sequence_id"]) == (done, order[done] if done < len(order) else None)
        if done in (0, 1, 70, len(order)):
            other = TraceDataset(run[0]).sequences("train", (), shuffle_seed=seed)
            other.load_state_dict(state)
            assert [each.sequence_id for each in other] == order[done:]
        next(stream, None)


def test_a_state_of_another_order_is_refused(run):
    dataset = TraceDataset(run[0])
    stream = dataset.sequences("train", (), shuffle_seed=1)
    next(stream)
    for other in (
        dataset.sequences("train", (), shuffle_seed=2),
        dataset.sequences("test", (), shuffle_seed=1),
        dataset.sequences("train", (), shuffle_seed=1, worker=(0, 2)),
    ):
        with pytest.raises(ConfigurationError, match=r"the reading state stands before sequence .* of another order"):
            other.load_state_dict(stream.state_dict())
        assert other.position == 0


@pytest.mark.parametrize("seed", [None, 3])
def test_worker_processes_share_the_sequences_without_duplicates(run, seed):
    class Everything(IterableDataset):
        def __iter__(self):
            info = get_worker_info()
            parts = TraceDataset(run[0]).sequences("all", (), shuffle_seed=seed, worker=(info.id, info.num_workers))
            return (each.sequence_id for each in parts)

    loader = DataLoader(Everything(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(loader) == list(range(200))


def test_layers_are_chosen_in_the_order_given(run):
    dataset = TraceDataset(run[0])
    for part, whole in zip(
        dataset.sequences("test", EVERYTHING, layers=[2, 0]), dataset.sequences("test", EVERYTHING), strict=True
    ):
        assert np.array_equal(part.expert_ids_TLK, whole.expert_ids_TLK[:, [2, 0]])
        assert np.array_equal(part.routing_weights_TLK, whole.routing_weights_TLK[:, [2, 0]])
        assert np.array_equal(part.router_logits_TLE, whole.router_logits_TLE[:, [2, 0]])
    with pytest.raises(ValueError, match=r"layers \[3\] are not all in 0\.\.2"):
        dataset.sequences(layers=[3])


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_makes_a_shard_read_silently_wrong(small, place, bit):
    folder, sequences = small
    content = bytearray((folder / "data/train-00000.parquet").read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as flipped:
        (Path(flipped) / "train-00000.parquet").write_bytes(content)
        found = sequences
        with contextlib.suppress(ExpertSpeculationError):
            found = list(TraceDataset(Path(flipped)).sequences("all", EVERYTHING))
        run = Path(shutil.copytree(folder, Path(flipped) / "run"))
        (run / "data/train-00000.parquet").write_bytes(content)
        if int(place * len(content)) >= 4:  # the opening magic is all that the manifest's parts do not cover
            with pytest.raises(ExpertSpeculationError):
                list(TraceDataset(run).sequences("all", EVERYTHING))
    for each, written in zip(found, sequences, strict=True):
        assert_equal(each, written)


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_spec, make_sequences, write_run):
    """A run of one small shard, with what was written."""
    spec = make_spec()
    sequences = make_sequences(spec, [9, 8, 7, 20])
    folder = tmp_path_factory.mktemp("small")
    write_run(folder, spec, sequences)
    return folder, sequences
