"""FLAME-MoE's folders: row i of every file is one token, so files that differ in length can not be lined up."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groundwork.errors import ConfigurationError


@pytest.fixture
def capture(routing, tmp_path):
    """Return a function that writes 10 tokens of layers 02 and 03, top 2, and gives back ids and scores."""

    def write(layers=(2, 3), samples=(6, 4), change=None, iteration="iter_5473"):
        folder = tmp_path / "flame-moe-290m" / "actives" / iteration
        folder.mkdir(parents=True)
        ids = routing(10, len(layers), 2).astype(np.int16)
        scores = np.sort(np.random.default_rng(0).random(ids.shape), axis=-1)[..., ::-1].astype(np.float16) / 2
        for position, layer in enumerate(layers):
            columns = {"scores": scores[:, position].tolist(), "indices": ids[:, position].tolist()}
            if change is not None and position == 0:
                change(columns)
            schema = pa.schema({"scores": pa.list_(pa.float16()), "indices": pa.list_(pa.int16())})
            schema = pa.schema([field for field in schema if field.name in columns])
            arrays = [pa.array(columns[field.name], pa.list_(field.type.value_type)) for field in schema]
            pq.write_table(
                pa.Table.from_arrays(arrays, schema=schema), folder / f"layer_{layer:02d}.parquet", row_group_size=3
            )
        (tmp_path / "flame-moe-290m" / "samples").mkdir(exist_ok=True)
        for number, count in enumerate(samples):
            token_ids = pa.array(np.arange(count) + 100 * number, pa.int32())
            pq.write_table(pa.table({"token_id": token_ids}), tmp_path / f"flame-moe-290m/samples/{number:03d}.parquet")
        return folder, ids, scores

    return write


def test_rows_are_cut_into_sequences_and_megatrons_layers_count_from_1(capture, run_import, load_all, tmp_path):
    folder, ids, scores = capture()
    result = run_import("flame", folder, sequence_length=5)
    assert (result.dropped.total, result.spec.moe_layers, result.spec.weights_normalized) == (0, (1, 2), False)
    first, second = load_all(tmp_path / "run")
    assert first.token_ids_T.tolist() == [0, 1, 2, 3, 4]
    assert second.token_ids_T.tolist() == [5, 100, 101, 102, 103]
    assert (second.expert_ids_TLK == ids[5:]).all()
    assert (second.routing_weights_TLK == scores[5:]).all()
    assert (second.dataset, second.sequence_key) == ("flame-moe-290m", "1")


def test_the_models_folder_will_do_where_it_holds_one_capture(capture, run_import, tmp_path):
    capture()
    assert run_import("flame", tmp_path / "flame-moe-290m", sequence_length=10).sequences == 1
    capture(iteration="iter_0540")
    with pytest.raises(ConfigurationError, match="several captures, iter_0540, iter_5473; name one folder"):
        run_import("flame", tmp_path / "flame-moe-290m", sequence_length=10, output_dir=tmp_path / "other")


def test_rows_after_the_last_whole_sequence_are_left_out(capture, run_import, only_reason):
    folder, _, _ = capture()
    result = run_import("flame", folder, sequence_length=4)
    assert only_reason(result) == f"rows after the last whole sequence: {folder} rows 8-9: 2 rows"
    assert result.sequences == 2


def test_a_sequence_length_must_be_given_where_nothing_tells_it(capture, run_import):
    folder, _, _ = capture()
    with pytest.raises(ConfigurationError, match=r"no sequence boundaries; give --sequence_length .*2048"):
        run_import("flame", folder)


def test_without_samples_or_scores_there_are_no_token_ids_or_weights(capture, run_import, load_all, tmp_path):
    folder, ids, _ = capture(layers=(2,), samples=(), change=lambda columns: columns.pop("scores"))
    result = run_import("flame", folder, sequence_length=10)
    (found,) = load_all(tmp_path / "run")
    assert (found.token_ids_T == -1).all()
    assert (result.spec.store, result.spec.expert_order) == ((), "unknown")
    assert (found.expert_ids_TLK == ids).all()


def cut(columns):
    for values in columns.values():
        values.pop()


def short(columns):
    columns["indices"][7] = [1]


def missing(columns):
    columns["indices"][7] = None


def unscored(columns):
    columns["scores"][7] = [0.5]


def infinite(columns):
    columns["scores"][7] = [float("inf"), 0.5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (short, "experts per token vary: PLACE: indices are not lists of one length"),
        (missing, "experts per token vary: PLACE: indices are not lists of one length"),
        (unscored, "experts per token vary: PLACE: scores are not lists of one length"),
        (infinite, "weight not finite: PLACE: token 2, layer 1"),
        (
            lambda columns: columns.update(indices=[[1]] * 10, scores=[[1.0]] * 10),
            "experts per token vary: PLACE: layers name",
        ),
    ],
)
def test_a_sequence_with_a_bad_row_is_left_out(change, reason, capture, run_import):
    folder, _, _ = capture(change=change)
    result = run_import("flame", folder, sequence_length=5)
    ((name, found),) = result.dropped.facts().items()
    assert f"{name}: {found['places'][-1]}".startswith(reason.replace("PLACE", f"{folder} rows 5-9"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"change": cut}, r"layer_03\.parquet: 10 rows, layer_02\.parquet has 9; rows can not be lined up"),
        ({"samples": (6,)}, r"samples: 6 rows, layer_02\.parquet has 10; rows can not be lined up"),
        ({"layers": (0, 1)}, r"wanted layer_01\.parquet and so on, numbered from 1"),
        ({"change": lambda columns: columns.pop("indices")}, r"layer_02\.parquet: column indices is missing"),
    ],
)
def test_files_that_can_not_be_lined_up_are_refused(given, message, capture, run_import):
    folder, _, _ = capture(**given)
    with pytest.raises(ConfigurationError, match=message):
        run_import("flame", folder, sequence_length=5)


def test_a_layer_that_is_missing_is_noticed_where_the_layers_are_declared(capture, run_import, only_reason):
    folder, _, _ = capture(layers=(2, 4))
    found = only_reason(run_import("flame", folder, sequence_length=10, moe_layers=(1, 2, 3)))
    assert found.endswith("its layers are 1,3, --moe_layers is 1-3")


def test_no_capture_and_damaged_files_are_refused(capture, run_import, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no layer_NN\.parquet; name one folder of layer files"):
        run_import("flame", tmp_path, sequence_length=5)
    folder, _, _ = capture()
    damaged = folder / "layer_03.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match=r"layer_03\.parquet: no Parquet file"):
        run_import("flame", folder, sequence_length=5)


@pytest.mark.parametrize("lines", [[{"num_tokens": 11}], [{"num_tokens": 0}], ["x"], b"{"])
def test_a_sidecar_that_does_not_fit_the_rows_is_refused(lines, capture, run_import, tmp_path):
    folder, _, _ = capture()
    text = lines if isinstance(lines, bytes) else "\n".join(map(json.dumps, lines)).encode()
    (tmp_path / "flame-moe-290m" / "sequences.jsonl.gz").write_bytes(gzip.compress(text))
    with pytest.raises(ConfigurationError, match=r"sequences\.jsonl\.gz:1: "):
        run_import("flame", folder)
