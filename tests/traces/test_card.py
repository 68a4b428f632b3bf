"""The card says what is there, hostile names stay text, and `load_dataset` finds the shards through it."""

from dataclasses import replace

from datasets import load_dataset

from traces.card import render_card, write_card
from traces.manifest import read_manifest


def test_card_leads_load_dataset_to_the_shards(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    write_run(tmp_path / "run", spec, make_sequences(spec, [20, 30, 5]), shards=2)
    write_card(tmp_path / "run")
    loaded = load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 55


def test_card_counts_what_is_written_and_names_what_is_missing(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec(model_name='evil"\n---\n<script>|')
    plan = write_run(tmp_path, spec, make_sequences(spec, [20, 30, 5, 6]), shards=2)
    lines = [replace(line, notes=("batch 3 was split",)) for line in read_manifest(tmp_path)]
    whole, half = render_card(plan, lines), render_card(plan, lines[:1])
    assert "4 sequences, 61 tokens, 2 shards" in whole
    assert "- train-00001.parquet: batch 3 was split" in whole
    assert "2 sequences, 50 tokens, 1 shards" in half
    assert "1 of 2 planned shards are not there yet" in half
    assert "| books | 1 | 20 |" in half
    assert "| books | 2 | 26 |" in whole
    assert "<script>" not in whole.partition("\n---\n")[2]
    assert whole.count("\n---\n") == 1
