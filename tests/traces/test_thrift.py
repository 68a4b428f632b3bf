"""Thrift structs read as they were written, and anything else ends in an IndexError within the bytes there are."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.checksums import parse_metadata, read_footer_bytes
from traces.thrift import read_struct

STRUCT = b"\x15\x02\x26\xd8\x04\x18\x03abc\x1c\x11\x12\x00\x19\x28\x01x\x01y\x17" + bytes(8) + b"\x00"


def test_fields_are_read_by_number_and_kind():
    fields = {1: 1, 3: 300, 4: b"abc", 5: {1: True, 2: False}, 6: [b"x", b"y"], 7: None}
    assert read_struct(STRUCT, 0) == (fields, len(STRUCT))
    assert read_struct(b"??" + STRUCT + b"more", 2) == (fields, len(STRUCT) + 2)
    assert read_struct(b"\x05\x80\x01\x01\x00", 0) == ({64: -1}, 5)  # a field number of its own


@pytest.mark.parametrize("length", range(len(STRUCT)))
def test_struct_that_ends_early_is_refused(length):
    with pytest.raises(IndexError):
        read_struct(STRUCT[:length], 0)


@pytest.mark.parametrize(
    "content",
    [
        b"\x15\x02\x05\x02\x04\x00",  # the same field twice: Arrow might read the other one
        b"\x19\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a list of 2**63 structs
        b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x00",  # a text of 2**63 bytes
        b"\x15" + b"\xff" * 11 + b"\x00",
        b"\x1e\x00",
    ],
)
def test_content_that_is_none_of_parquets_is_refused(content):
    with pytest.raises(IndexError):
        read_struct(content, 0)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content):
    try:
        _, end = read_struct(content, 0)
        assert 0 < end <= len(content)
    except (IndexError, RecursionError):
        pass


def test_footer_that_names_an_unknown_codec_is_refused_before_arrow_ends_the_process():
    file = io.BytesIO()
    pq.write_table(pa.table({"number": pa.array([1, 2, 3])}), file, compression="zstd")
    footer = read_footer_bytes(file)
    fields, _ = read_struct(footer, 0)
    assert fields[4][0][1][0][3][4] == 6  # row group 0, column 0, metadata, codec: zstd
    assert parse_metadata(footer).num_rows == 3
    name = footer.index(b"number", footer.index(b"number") + 1)  # the column's path, before its codec
    assert footer[name + 6 : name + 8] == b"\x15\x0c"
    with pytest.raises(ValueError, match="columns of an unknown kind"):
        parse_metadata(footer[: name + 7] + b"\x4c" + footer[name + 8 :])
