"""Column chunks that were read and checked, given to Arrow as the file that they came from.

So the disk is read once, and what Arrow decodes are the very bytes that were checked.
"""

import io


class ChunkFile(io.RawIOBase):
    """A file of which only some chunks are there, each at its offset; reading anything else raises ValueError."""

    def __init__(self, chunks: list[tuple[int, memoryview]]) -> None:
        self._chunks = chunks
        self._size = max(start + len(chunk) for start, chunk in chunks)
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset, counted from the start unless `whence` says otherwise."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> memoryview:
        """Return bytes of the chunk that the offset lies in, without copying them."""
        for start, chunk in self._chunks:
            if start <= self._at < start + len(chunk):
                found = chunk[self._at - start :][:size] if size >= 0 else chunk[self._at - start :]
                self._at += len(found)
                return found
        raise ValueError(f"byte {self._at} is in none of the columns that were read")
