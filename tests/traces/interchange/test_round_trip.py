"""Whatever a run holds that a format carries, importing its export gives equal tables."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.interchange.exporting import WRITERS, export_traces
from traces.interchange.importing import SOURCES, import_traces
from traces.interchange.settings import ImportSettings
from traces.reader import TraceDataset
from traces.verify import verify

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def runs(draw, make_spec, make_sequences):
    moe_layers = tuple(sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=3))))
    experts = draw(st.sampled_from([1, 2, 8, 300]))
    weighted = draw(st.booleans())
    spec = make_spec(
        num_layers=len(moe_layers),
        moe_layers=moe_layers,
        num_experts=experts,
        top_k=draw(st.integers(1, min(experts, 4))),
        store=("weights",) if weighted else (),
        expert_order="weight" if weighted else "unknown",
        weights_normalized=None,
    )
    sequences = make_sequences(
        spec, draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)), draw(st.integers(0, 99))
    )
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    changed = []
    for sequence in sequences:
        tokens = sequence.num_tokens
        weights = generator.choice(np.array([0, 0.1, 0.5, 1.75], np.float16), sequence.expert_ids_TLK.shape)
        some = draw(st.lists(TEXT, min_size=tokens, max_size=tokens)) if draw(st.booleans()) else [""] * tokens
        changed.append(
            replace(
                sequence,
                dataset=draw(TEXT.filter(bool)),
                sequence_key=draw(TEXT),
                tokens_T=some,
                token_ids_T=generator.integers(-1, draw(st.sampled_from([0, 9, 2**31 - 1])), tokens).astype(np.int32),
                phase_T=generator.integers(0, draw(st.integers(1, 2)), tokens).astype(np.uint8),
                routing_weights_TLK=-np.sort(-weights, axis=-1) if weighted else None,
            )
        )
    return spec, changed


@pytest.mark.parametrize("record_format", WRITERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_import_of_an_export_gives_equal_tables(
    record_format, data, make_spec, make_sequences, write_run, assert_equal, load_all, tmp_path_factory
):
    spec, sequences = data.draw(runs(make_spec, make_sequences))
    folder = tmp_path_factory.mktemp("round")
    write_run(folder / "run", spec, sequences)
    result = export_traces(folder / "run", folder / "out", record_format)
    assert (result.sequences, result.left_out) == (len(sequences), [])
    paths = [folder / "out"] if record_format == "flame" else [folder / "out" / name for name in result.files]
    told = ImportSettings(record_format, folder / "back", spec.num_experts, "m")
    back = import_traces(paths, told)
    assert back.dropped.total == 0
    for name in ("moe_layers", "num_experts", "top_k", "store", "expert_order"):
        assert getattr(back.spec, name) == getattr(spec, name), name
    assert_equal(load_all(folder / "back"), sequences)
    assert verify(folder / "back") == []


@pytest.fixture
def small_run(make_spec, make_sequences, write_run, tmp_path):
    spec = make_spec(moe_layers=(1, 3, 4), store=("weights", "logits"))
    write_run(tmp_path / "run", spec, make_sequences(spec, range(1, 21)))
    return tmp_path / "run"


@pytest.mark.parametrize("record_format", WRITERS)
def test_exports_name_what_they_leave_out_and_are_the_same_bytes_each_time(record_format, small_run, tmp_path):
    results = [export_traces(small_run, tmp_path / name, record_format) for name in ("a", "b")]
    assert results[0].left_out == ["router_logits"]
    for name in results[0].files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("record_format", WRITERS)
def test_sequences_of_one_name_stay_apart(
    record_format, make_spec, make_sequences, write_run, load_all, assert_equal, tmp_path
):
    spec = make_spec(weights_normalized=None)
    sequences = [replace(each, dataset="d", sequence_key="same") for each in make_sequences(spec, [3, 2, 4])]
    write_run(tmp_path / "run", spec, sequences)
    files = export_traces(tmp_path / "run", tmp_path / "out", record_format).files
    paths = [tmp_path / "out"] if record_format == "flame" else [tmp_path / "out" / name for name in files]
    import_traces(paths, ImportSettings(record_format, tmp_path / "back", 8, "m"))
    assert_equal(load_all(tmp_path / "back"), sequences)


@pytest.mark.parametrize("record_format", WRITERS)
def test_a_split_is_exported_alone(record_format, small_run, tmp_path):
    wanted = [sequence.sequence_key for sequence in TraceDataset(small_run).sequences("train")]
    result = export_traces(small_run, tmp_path / "out", record_format, split="train")
    assert 0 < result.sequences == len(wanted) < 20


def test_an_export_that_fails_or_meets_content_leaves_everything_as_it_was(small_run, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for target, changes, message in (
        ("used", {}, "used: is not empty"),
        ("new", {"split": "tset"}, "unknown"),
        ("new", {"record_format": "csv"}, "--format csv: unknown; choose one of requests, sglang"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            export_traces(small_run, tmp_path / target, **{"record_format": "requests"} | changes)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_split_is_refused(make_spec, make_sequences, write_run, tmp_path):
    write_run(tmp_path / "run", make_spec(), make_sequences(make_spec(), [3]))
    (own,) = TraceDataset(tmp_path / "run").index
    empty = next(name for name in ("train", "test") if name != own.split)
    with pytest.raises(ConfigurationError, match=f"split {empty} holds no sequences"):
        export_traces(tmp_path / "run", tmp_path / "new", "flame", split=empty)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_format_goes_both_ways():
    assert list(WRITERS) == list(SOURCES)
