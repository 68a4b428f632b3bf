"""What plan and shards prove is mended, what is proven wrong is moved aside and never deleted, and no kill loses it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from groundwork.errors import ConfigurationError
from traces.card import CARD_NAME, EDITED
from traces.manifest import MANIFEST_NAME, read_manifest
from traces.plan import PLAN_NAME, SEQUENCES_NAME
from traces.reader import TraceDataset
from traces.repair import DAMAGED_NAME, REBUILT, repair
from traces.verify import verify
from traces.writer import lock_run

SHARDS = [f"data/train-0000{index}.parquet" for index in range(3)]


@pytest.fixture(scope="module")
def write(make_spec, make_sequences, write_run):
    """Return a function that writes the run, or what is missing of it."""
    spec = make_spec()
    sequences = make_sequences(spec, [9, 8, 7, 6, 5, 4])
    return lambda folder: write_run(folder, spec, sequences, shards=3, row_group_tokens=9)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, write) -> Path:
    """A run of 3 shards."""
    folder = tmp_path_factory.mktemp("sound")
    write(folder)
    return folder


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def mended(run: Path) -> list[str]:
    """Repair; returns what was done, with the paths seen from the run folder; a second time there is nothing to do."""
    done = [sentence.replace(f"{run}/", "") for sentence in repair(run)]
    assert list(repair(run)) == []
    return done


def files(run: Path) -> dict[str, bytes]:
    """Return the content of every plain file but the lock."""
    paths = (path for path in run.rglob("*") if path.is_file() and not path.is_symlink() and path.name != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_sound_run_is_left_as_it_is(run):
    before = files(run)
    assert mended(run) == []
    assert files(run) == before


def test_lost_manifest_is_rebuilt_from_the_shards(run, sound):
    (run / MANIFEST_NAME).unlink()
    assert mended(run) == [
        f"{MANIFEST_NAME}: written anew (0 lines kept, 3 rebuilt, 0 dropped)",
        f"{CARD_NAME}: written anew",
    ]
    assert verify(run) == []
    before, after = read_manifest(sound), read_manifest(run)
    assert [line.notes for line in after] == [(REBUILT,)] * 3
    assert [(line.shard, line.sha256, line.chunk_crc32) for line in after] == [
        (line.shard, line.sha256, line.chunk_crc32) for line in before
    ]
    assert [s.sequence_key for s in TraceDataset(run).sequences()] == [f"row-{i}" for i in range(6)]
    assert "rebuilt" in (run / CARD_NAME).read_text()


def test_whole_lines_stay_byte_for_byte_and_in_order_beside_damaged_doubled_and_torn_ones(run):
    manifest = run / MANIFEST_NAME
    first, second, third = manifest.read_bytes().splitlines(keepends=True)
    old = third + second.replace(b'"tokens":13', b'"tokens":14') + third + b"{}\n" + first + second[:50]
    manifest.write_bytes(old)
    assert mended(run)[0] == (
        f"{MANIFEST_NAME}: written anew (2 lines kept, 1 rebuilt, 3 dropped; the old one is kept as "
        f"{DAMAGED_NAME}/{MANIFEST_NAME})"
    )
    assert manifest.read_bytes().startswith(third + first)
    assert (run / DAMAGED_NAME / MANIFEST_NAME).read_bytes() == old
    assert verify(run) == []


def test_shard_proven_wrong_is_moved_aside_and_made_again_on_resume(run, sound, write):
    contents = {}
    for times in (1, 2):
        flip(run / SHARDS[1])
        contents[times] = (run / SHARDS[1]).read_bytes()
        done = mended(run)
        assert done[0].startswith(f"{SHARDS[1]}: moved to {DAMAGED_NAME}/train-00001.parquet")
        assert done[0].endswith("(its sha256 differs from its manifest line)")
        assert [fault.problem for fault in verify(run)] == ["1 of 3 planned shards are not there yet"]
        write(run)
        assert verify(run) == []
    assert {path.name for path in (run / DAMAGED_NAME).iterdir()} == {
        *("train-00001.parquet", "train-00001.parquet.1", MANIFEST_NAME, f"{MANIFEST_NAME}.1")
    }
    assert (run / DAMAGED_NAME / "train-00001.parquet").read_bytes() == contents[1]
    assert [s.token_ids_T.tolist() for s in TraceDataset(run).sequences()] == [
        s.token_ids_T.tolist() for s in TraceDataset(sound).sequences()
    ]


def test_what_does_not_belong_into_data_is_moved_aside_even_links_fifos_and_folders(run, tmp_path):
    (tmp_path / "outside").write_text("mine")
    data = run / "data"
    (data / "notes.txt").write_text("mine")
    (data / "folder").mkdir()
    (data / "train-00007.parquet").symlink_to(tmp_path / "outside")
    os.mkfifo(data / "train-00008.parquet")
    shutil.copy(run / SHARDS[0], data / "train-00009.parquet")
    (run / MANIFEST_NAME).rename(run / "manifest")
    (run / MANIFEST_NAME).symlink_to(run / "manifest")
    mended(run)
    assert verify(run) == []
    names = {"notes.txt", "folder", MANIFEST_NAME, *(f"train-0000{number}.parquet" for number in (7, 8, 9))}
    assert {path.name for path in (run / DAMAGED_NAME).iterdir()} == names
    assert (tmp_path / "outside").read_text() == "mine"


def test_card_is_written_anew_unless_it_says_that_it_was_edited(run):
    card = run / CARD_NAME
    text = card.read_bytes()
    for damage in (card.unlink, lambda: flip(card), lambda: card.write_text("mine")):
        damage()
        assert mended(run) == [f"{CARD_NAME}: written anew"]
        assert card.read_bytes() == text
    card.write_text(f"# Mine\n{EDITED}\n")
    assert mended(run) == []
    assert card.read_text() == f"# Mine\n{EDITED}\n"


@pytest.mark.parametrize("name", [PLAN_NAME, SEQUENCES_NAME])
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_without_a_sound_plan_nothing_is_touched(run, name, damage):
    damage(run / name)
    flip(run / SHARDS[0])
    (run / CARD_NAME).unlink()
    before = files(run)
    with pytest.raises(ConfigurationError, match=rf"{name}: .*no other file holds .*restore it from a copy"):
        list(repair(run))
    assert files(run) == before


def test_folders_that_can_not_be_repaired_are_refused(run, tmp_path):
    bare = shutil.copytree(run / "data", tmp_path / "bare")
    with pytest.raises(ConfigurationError, match="bare: holds bare shards"):
        list(repair(bare))
    assert not (bare / ".lock").exists()
    with pytest.raises(ConfigurationError, match="none: missing"):
        list(repair(tmp_path / "none"))
    with lock_run(run), pytest.raises(ConfigurationError, match="another process is writing this run"):
        list(repair(run))
    flip(run / SHARDS[0])
    (run / DAMAGED_NAME).symlink_to(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"{DAMAGED_NAME}: a link or a file"):
        list(repair(run))


class Killed(BaseException):
    """Stands for the death of the process."""


def deaths(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Die before file operation `step`; those of `repair` all go through these three functions."""
    left = step

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "fsync"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        yield


def test_killed_at_any_step_nothing_is_lost_and_the_next_repair_ends_the_same(run, sound, tmp_path, monkeypatch):
    flip(run / SHARDS[1])
    lines = (run / MANIFEST_NAME).read_bytes().splitlines(keepends=True)
    (run / MANIFEST_NAME).write_bytes(b"".join(lines[:2]))
    (run / CARD_NAME).unlink()
    wrong = (run / SHARDS[1]).read_bytes()
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    list(repair(whole))
    step, finished = 0, False
    while not finished:
        again = Path(shutil.copytree(run, tmp_path / f"killed at {step}"))
        for _ in deaths(monkeypatch, step):
            try:
                list(repair(again))
                finished = True
            except Killed:
                pass
        kept = files(again)
        assert wrong in kept.values()
        assert all(kept[name] == (sound / name).read_bytes() for name in (SHARDS[0], SHARDS[2]))
        assert any(lines[1] in content for content in kept.values())
        list(repair(again))
        left = {name: content for name, content in files(again).items() if not name.endswith(".tmp")}
        assert left.keys() - files(whole).keys() <= {f"{DAMAGED_NAME}/{MANIFEST_NAME}.1"}
        assert files(whole).items() <= left.items()
        step += 1
    assert step > 10
