"""A shard's checksums are what hashlib and zlib say of its bytes, and only a file with a sound footer has any."""

import hashlib
import io
import zlib

import pytest

from traces.checksums import FOOTER_LIMIT, checksums, file_sha256, parse_metadata, read_footer_bytes
from traces.claims import chunk_range


@pytest.fixture
def shard(tmp_path, make_spec, make_sequences, write_run):
    spec = make_spec()
    write_run(tmp_path, spec, make_sequences(spec, [9, 8, 7]), row_group_tokens=10)
    return tmp_path / "data" / "train-00000.parquet"


def test_checksums_cover_file_footer_and_every_chunk_without_a_gap(shard):
    content = shard.read_bytes()
    found = checksums(shard)
    assert found.bytes == len(content)
    assert found.sha256 == file_sha256(shard) == hashlib.sha256(content).hexdigest()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    assert found.footer_blake2b == hashlib.blake2b(footer, digest_size=16).hexdigest()
    metadata = parse_metadata(footer)
    at = 4
    for group, crc in zip(map(metadata.row_group, range(3)), found.chunk_crc32, strict=True):
        for number, value in enumerate(crc):
            assert chunk_range(group.column(number))[0] == at
            stop = at + group.column(number).total_compressed_size
            assert value == zlib.crc32(content[at:stop])
            at = stop
    assert at == len(content) - len(footer)


def test_file_that_does_not_end_in_a_footer_of_likely_size_is_refused():
    for end in (b"", b"PAR1", b"\x00\x00\x00\x00PARE", (100).to_bytes(4, "little") + b"PAR1"):
        with pytest.raises(ValueError, match="does not end in a Parquet footer"):
            read_footer_bytes(io.BytesIO(end))
    length = FOOTER_LIMIT
    file = io.BytesIO(bytes(length) + length.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match=f"its footer takes {length + 8} bytes"):
        read_footer_bytes(file)
    larger = io.BytesIO(bytes(64 * (length + 8)) + file.getvalue())  # a footer grows with its file
    assert len(read_footer_bytes(larger)) == length + 8
