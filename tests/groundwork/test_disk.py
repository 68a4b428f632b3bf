"""A full disk is known for one by whatever library meets it, and told from every other error."""

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from groundwork.disk import free_bytes, full_disk, saying_disk_full
from groundwork.errors import ConfigurationError, ExpertSpeculationError


def plain(path: Path) -> None:
    path.write_bytes(bytes(10_000))


def tensors(path: Path) -> None:
    save_file({"zeros": torch.zeros(10_000)}, path)


def tokenizer(path: Path) -> None:
    Tokenizer(models.WordLevel({f"word{number}": number for number in range(1000)}, unk_token="word0")).save(str(path))


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Limit the size of a file, which stands in for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("write", [plain, tensors, tokenizer])
def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with (
        pytest.raises(
            ExpertSpeculationError, match=r"^/run: can not be written \(File too large\); free some$"
        ) as said,
        saying_disk_full(Path("/run"), "free some"),
    ):
        write(tmp_path / "file")
    assert said.value.exit_code == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (Exception("Error while serializing: I/O error: ... (os error 28)"), "No space left on device"),
        (OSError(errno.EACCES, "No space left on device"), None),
        (Exception("Permission denied (os error 13)"), None),
        (ValueError("28"), None),
    ],
)
def test_only_a_full_disk_is_called_so(error: Exception, reason: str | None) -> None:
    assert full_disk(error) == reason


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "x"), ConfigurationError("a (os error 28)")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, saying_disk_full(Path("/run"), "free some"):
        raise error
    assert raised.value is error


def test_room_is_told_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), abs=2**30)
    assert free_bytes(tmp_path / "a" / "b") > 0
