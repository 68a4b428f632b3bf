"""`plan.parquet`: one row per sequence, read only where its claims fit the plan and the file's own size.

A few hundred bytes of Parquet can claim a billion rows, or one long string a million times over. A real table takes
about 5 to 10 bytes a row and grows tenfold when decoded, so a row a byte and SWELL bytes a byte are the bounds.
"""

from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from traces.checksums import parse_metadata, read_chunk, read_footer_bytes
from traces.claims import check_chunks, check_pages, check_strings

SWELL = 64  # decoded bytes per byte of the file, beyond FLOOR
FLOOR = 64 * 2**20  # decoded bytes that any table may have


def read_plan_table(file: BinaryIO, schema: pa.Schema, rows: int) -> pa.Table:
    """Return the table in an open file that should have this schema and so many rows.

    Raises ValueError, or pyarrow's errors, where it is another table, or would take more memory than is likely.
    """
    footer = read_footer_bytes(file)
    size = file.seek(0, 2)
    metadata = parse_metadata(footer)
    if metadata.num_rows != rows or rows > size:
        raise ValueError(f"it claims {metadata.num_rows} rows in {size} bytes, wanted {rows}")
    if not metadata.schema.to_arrow_schema().remove_metadata().equals(schema):
        raise ValueError(f"its columns are not {', '.join(schema.names)} of the planned types")
    check_chunks(metadata, size - len(footer))
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    limit = FLOOR + SWELL * size
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            limit -= check_pages(read_chunk(file, column), column, limit)
    # Reading ahead would be done by a thread of Arrow's, which still holds Python's file when the table is there: a
    # process that exits just then is aborted.
    source = pq.ParquetFile(
        file, metadata=metadata, read_dictionary=strings, page_checksum_verification=True, pre_buffer=False
    )
    table = source.read(use_threads=False)
    for name in strings:
        limit -= check_strings(table[name], limit)
    return table.cast(schema)
