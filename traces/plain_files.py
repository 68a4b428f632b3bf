"""Opens files that may have been put there by anyone: plain files only, and no more bytes than they should have.

A link could lead out of the folder, a FIFO or device would block or never end; none of them is opened.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

NO_PLAIN_FILE = "a link or no plain file, wanted the file itself"


def open_plain(path: Path) -> BufferedReader:
    """Open a file for reading; raises ValueError where it is a link or no plain file, OSError as `open` does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise ValueError(NO_PLAIN_FILE) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(NO_PLAIN_FILE)
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, limit: int) -> bytes:
    """Return a file's content; raises as `open_plain` does, and ValueError where it has more than `limit` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"takes {size} bytes, wanted {limit} at most")
        return file.read(limit)
