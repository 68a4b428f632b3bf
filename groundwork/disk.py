"""Room on a disk: how much is free where a folder will be, and one sentence where it fills up all the same."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groundwork.errors import ExpertSpeculationError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that `folder`, which need not exist yet, is or will be on."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def full_disk(error: Exception) -> str | None:
    """Return what the system says of a full disk in `error`; None where it is about anything else.

    Besides OSError these are errors of safetensors and tokenizers, which name the system's error in their text only.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return os.strerror(number) if number in NO_SPACE else None


@contextmanager
def saying_disk_full(folder: Path, remedy: str) -> Iterator[None]:
    """Turn an error of a full disk into an ExpertSpeculationError that names the folder and says what to do."""
    try:
        yield
    except ExpertSpeculationError:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise ExpertSpeculationError(f"{folder}: can not be written ({reason}); {remedy}") from error
