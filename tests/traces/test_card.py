"""The card says what is there, hostile names stay text, and `load_dataset` finds the shards through it."""

import hashlib
from dataclasses import replace

from datasets import load_dataset

from traces.card import CARD_NAME, EDITED, card_fault, render_card, sealed_card, sealed_facts, write_card
from traces.manifest import read_manifest
from traces.plan import Plan


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


def test_seal_says_what_the_card_is_of_and_breaks_with_any_change(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    plan = write_run(tmp_path, spec, make_sequences(spec, [20, 30, 5, 6]), shards=2)
    lines = read_manifest(tmp_path)
    card = sealed_card(plan, lines)
    assert (tmp_path / CARD_NAME).read_bytes() == card
    assert sealed_facts(card) == f"plan {'f' * 32}: 2 shards, 4 sequences, 61 tokens, 0 notes"
    for changed in (
        card[:-1],
        card + b"\n",
        card.replace(b"61 tokens", b"62 tokens"),
        card.replace(b"# R", b"## R"),
        b"",
    ):
        assert sealed_facts(changed) is None
    assert card_fault(tmp_path, plan, lines) is None
    assert "is out of date" in str(card_fault(tmp_path, plan, lines[:1]))
    assert card_fault(tmp_path, plan, None) is None  # where nothing sound is there to count


def test_card_of_another_version_of_this_program_is_not_condemned(tmp_path, make_spec, make_sequences, write_run):
    """Its words differ; its seal holds the same facts."""
    spec = make_spec()
    plan = write_run(tmp_path, spec, make_sequences(spec, [20, 30]))
    lines = read_manifest(tmp_path)
    body, _, seal = (tmp_path / CARD_NAME).read_text().removesuffix("\n").rpartition("\n")
    facts = seal.removeprefix("<!-- ").partition("; blake2b")[0]
    other = body.replace("Known gaps", "What is missing") + "\n"
    digest = hashlib.blake2b(f"{other}{facts}".encode(), digest_size=16).hexdigest()
    (tmp_path / CARD_NAME).write_text(f"{other}<!-- {facts}; blake2b {digest} -->\n")
    assert card_fault(tmp_path, plan, lines) is None


def test_card_marked_as_edited_is_not_written_over(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    write_run(tmp_path, spec, make_sequences(spec, [20, 30]))
    mine = f"# Mine\n{EDITED}\n"
    (tmp_path / CARD_NAME).write_text(mine)
    write_card(tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == mine
    assert card_fault(tmp_path, Plan.load(tmp_path), read_manifest(tmp_path)) is None
    (tmp_path / CARD_NAME).write_text(f"{EDITED}\n# Mine\n")
    assert card_fault(tmp_path, None, None) is not None
    write_card(tmp_path)
    assert sealed_facts((tmp_path / CARD_NAME).read_bytes())
