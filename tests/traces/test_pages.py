"""List columns decode to what Arrow decodes, and page headers that lie are refused before anything is allocated."""

import io
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.checksums import read_chunk
from traces.claims import check_pages
from traces.pages import DICTIONARY_PAGE, decode_lists, is_split, walk_pages

ZSTD = pa.Codec("zstd")


def integer(value: int) -> bytes:
    value, out = value << 1 if value >= 0 else (-value << 1) - 1, b""
    while value > 127:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


def page(
    body: bytes, *, uncompressed: int, values: int, kind: int = 0, encoding: int = 9, size: int = -1
) -> memoryview:
    """Return a page with a header in Thrift's compact protocol, fields as in parquet.thrift."""
    own = b"\x15" + integer(values) + b"\x15" + integer(encoding) + b"\x15\x06\x15\x06\x00"
    header = b"\x15" + integer(kind) + b"\x15" + integer(uncompressed)
    header += b"\x15" + integer(len(body) if size < 0 else size)
    header += b"\x15" + integer(int.from_bytes(zlib.crc32(body).to_bytes(4), signed=True))
    header += (b"\x1c" if kind == 0 else b"\x3c") + own + b"\x00"
    return memoryview(header + body)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 400),
    width=st.integers(1, 9),
    dtype=st.sampled_from(["u1", "u2", "f2"]),
    page_bytes=st.sampled_from([64, 1000, 2**20]),
    seed=st.integers(0, 9),
)
def test_lists_decode_as_arrow_decodes_them(rows, width, dtype, page_bytes, seed):
    values = np.random.default_rng(seed).integers(0, 256 ** np.dtype(dtype).itemsize, rows * width)
    values = values.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
    field = pa.field(
        "x", pa.list_(pa.field("element", pa.from_numpy_dtype(dtype), nullable=False), width), nullable=False
    )
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    file = io.BytesIO()
    pq.write_table(
        pa.table([column], schema=pa.schema([field])),
        file,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"x.list.element": "BYTE_STREAM_SPLIT"},
        data_page_size=page_bytes,
        write_page_checksum=True,
    )
    chunk = read_chunk(file, pq.read_metadata(file).row_group(0).column(0))
    assert is_split(chunk)
    decoded = decode_lists(chunk, rows * width, np.dtype(dtype), 4 if dtype != "f2" else 2, trusted=False)
    assert decoded.dtype == dtype
    assert decoded.tobytes() == values.tobytes()


VALUES = [0x0102, 0x0304, 0x0506, 0x0708]
BODY = ZSTD.compress(bytes([2, 4, 6, 8, 1, 3, 5, 7]), asbytes=True)  # their low bytes, then their high ones


def test_a_page_of_ours_decodes():
    chunk = page(BODY, uncompressed=8, values=4)
    assert is_split(chunk)
    assert decode_lists(chunk, 4, np.dtype("u2"), 2, trusted=False).tolist() == VALUES


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        ({"uncompressed": 2**40}, "claims 1099511627776 bytes"),
        ({"values": 2**31 - 1}, "a page of kind 0"),
        ({"values": -4}, "a page of kind 0"),
        ({"uncompressed": 7}, "claims 7 bytes"),
        ({"uncompressed": 9}, "(?i)zstd"),
        ({"size": 2**31 - 1}, "reaches beyond its column"),
        ({"encoding": 0}, "encoding 0"),
        ({"kind": DICTIONARY_PAGE}, "a page of kind 2"),
        ({"kind": 1}, "a page of kind 1"),
    ],
    ids=str,
)
def test_page_that_lies_is_refused(lie, problem):
    chunk = page(BODY, **{"uncompressed": 8, "values": 4} | lie)
    with pytest.raises((ValueError, OSError), match=problem):
        decode_lists(chunk, 4, np.dtype("f2"), 2, trusted=False)


def test_every_flipped_bit_and_every_cut_of_a_page_is_refused_or_changes_nothing():
    """A change does no harm in what nothing here reads: the levels' encodings, the number of the checksum's field."""
    chunk = page(BODY, uncompressed=8, values=4)
    harmless = 0
    for bit in range(len(chunk) * 8):
        content = bytearray(chunk)
        content[bit // 8] ^= 1 << bit % 8
        try:
            values = decode_lists(memoryview(content), 4, np.dtype("u2"), 2, trusted=False)
        except (ValueError, OSError):
            continue
        harmless += 1
        assert values.tolist() == VALUES
    assert harmless < 40
    for length in range(1, len(chunk)):
        with pytest.raises(ValueError, match=r"page|values"):
            decode_lists(chunk[:length], 4, np.dtype("f2"), 2, trusted=False)


def test_dictionary_that_claims_more_entries_than_bytes_is_refused():
    column = pq.ParquetFile(parquet_of_one_column()).metadata.row_group(0).column(0)
    sound = page(BODY, uncompressed=8, values=2, kind=DICTIONARY_PAGE, encoding=0)
    assert check_pages(sound, column, 100) == 8
    with pytest.raises(ValueError, match="claims 1073741824 values in 8 bytes"):
        check_pages(page(BODY, uncompressed=8, values=2**30, kind=DICTIONARY_PAGE, encoding=0), column, 100)
    with pytest.raises(ValueError, match="claims 8 bytes, wanted 7 at most"):
        check_pages(sound, column, 7)


def parquet_of_one_column() -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": ["some", "words"]}), file)
    return file


def test_what_is_no_page_is_refused():
    for content in (b"\x00", b"\xff" * 50, b"\x1c" * 5000, b"\x15\x00" * 10):
        with pytest.raises(ValueError, match="no page header at byte 0"):
            list(walk_pages(memoryview(content)))
