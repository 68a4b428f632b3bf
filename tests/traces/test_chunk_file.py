"""Arrow reads a column out of its chunk alone, as it does out of the whole file, and nothing else is there to read."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from traces.checksums import read_chunk
from traces.chunk_file import ChunkFile
from traces.claims import chunk_range


def test_arrow_reads_columns_out_of_their_chunks(tmp_path):
    table = pa.table({name: [name * n for n in range(50)] for name in "abc"})
    file = io.BytesIO()
    pq.write_table(table, file)
    metadata = pq.read_metadata(file)
    columns = [metadata.row_group(0).column(number) for number in (0, 2)]
    chunks = ChunkFile([(chunk_range(column)[0], read_chunk(file, column)) for column in columns])
    reader = pq.ParquetFile(chunks, metadata=metadata, pre_buffer=False)
    assert reader.read_row_group(0, columns=["a", "c"]).equals(table.select(["a", "c"]))
    with pytest.raises(ValueError, match="in none of the columns that were read"):
        reader.read_row_group(0, columns=["b"])


def test_reading_stays_within_a_chunk():
    file = ChunkFile([(10, memoryview(b"abcdef")), (30, memoryview(b"xyz"))])
    assert file.seek(0, io.SEEK_END) == 33
    assert (file.seek(12), bytes(file.read(3)), file.tell()) == (12, b"cde", 15)
    assert (bytes(file.read()), bytes(file.read(0) if file.seek(30) else b"")) == (b"f", b"")
    for outside in (0, 16, 33):
        file.seek(outside)
        with pytest.raises(ValueError, match=f"byte {outside} is in none"):
            file.read(1)
