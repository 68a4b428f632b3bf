"""The first byte that is not UTF-8 is named, wherever it lies."""

from pathlib import Path

import pytest

from collection.utf8 import require_utf8
from groundwork.errors import ConfigurationError


def test_utf8_is_checked_across_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lead = b"a\n" * (1 << 19)
    path.write_bytes(lead[:-1] + "é".encode() + b"\n\x80")
    with pytest.raises(ConfigurationError, match=rf"byte {len(lead) + 2} \(0x80, line {(1 << 19) + 1}\)"):
        require_utf8(path)
    path.write_bytes(lead[:-1] + "é".encode()[:1])
    with pytest.raises(ConfigurationError, match=rf"byte {len(lead) - 1} \(0xc3"):
        require_utf8(path)
