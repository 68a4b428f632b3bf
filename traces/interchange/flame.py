"""Format `flame`: FLAME-MoE-Traces, one Parquet file per layer beside the token ids.

    samples/000.parquet ...                       token_id: int32, one row per token
    actives/iter_5473/layer_02.parquet ...        indices: list<int16>[K], scores: list<float16>[K], one row per token

Row i of every file is the same token. Megatron counts layers from 1, so `layer_02` is the model's layer 1. There are no
sequence boundaries: the rows are the training batches' sequences end to end, all of one length. What export adds, so
that nothing is lost, is `sequences.jsonl.gz`: one line per sequence with length, data set, id, phases and strings.

Read: the data set card huggingface.co/datasets/CMU-FLAME/FLAME-MoE-Traces (layout, columns, types; 52,428,800 tokens a
capture) and the model cards CMU-FLAME/FLAME-MoE-* (sequence length 2048; 9, 12 and 18 layers where the layer files end
at 09, 12 and 18, hence counted from 1). Not seen: the files themselves.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from traces.interchange.files import JsonLinesWriter, read_lines
from traces.interchange.record import Dropped, Record, Source, Unusable
from traces.interchange.settings import ImportSettings
from traces.interchange.values import as_phases, as_strings, as_text, parse_json, phase_value
from traces.schema import SequenceTrace, TraceSpec

FIRST_LAYER = 1  # the number Megatron gives the model's first layer
LAYER_FILE = re.compile(r"layer_(\d+)\.parquet")
SIDECAR = "sequences.jsonl.gz"
ROWS_AT_ONCE = 8192


class FlameSource(Source):
    """The sequences of one capture; memory: a few thousand rows of each layer.

    Raises ConfigurationError where the files can not be lined up: other row counts, other columns.
    """

    def __init__(self, paths: list[Path], settings: ImportSettings) -> None:
        if len(paths) != 1:
            raise ConfigurationError(f"{len(paths)} folders given; import one FLAME capture at a time")
        self.capture = _find_capture(paths[0])
        model = self.capture.parent.parent
        found = ((LAYER_FILE.fullmatch(path.name), path) for path in self.capture.iterdir())
        self.layers = dict(sorted((int(match[1]) - FIRST_LAYER, path) for match, path in found if match))
        self.samples = sorted((model / "samples").glob("*.parquet"))
        self.sidecar = model / SIDECAR
        if min(self.layers, default=-1) < 0:
            raise ConfigurationError(f"{self.capture}: wanted layer_01.parquet and so on, numbered from 1")
        self.rows = _equal_rows(self.layers, self.samples)
        if not self.sidecar.exists() and settings.sequence_length is None:
            raise ConfigurationError(
                f"{self.capture}: FLAME files hold no sequence boundaries; give --sequence_length "
                "(FLAME-MoE was trained on 2048 tokens)"
            )
        sidecar = [self.sidecar] if self.sidecar.exists() else []
        super().__init__([*self.layers.values(), *self.samples, *sidecar], settings)

    def __iter__(self) -> Iterator[Record | Dropped]:
        with ExitStack() as stack:
            layers = [stack.enter_context(_Rows([path], ("indices", "scores"))) for path in self.layers.values()]
            samples = stack.enter_context(_Rows(self.samples, ("token_id",))) if self.samples else None
            row = 0
            for number, (length, about) in enumerate(self._boundaries()):
                where = f"{self.capture} rows {row}-{row + length - 1}"
                if about is None:
                    yield Dropped(0, where, "rows after the last whole sequence", f"{length} rows")
                    return
                tables = [rows.take(length) for rows in layers]
                tokens = samples.take(length) if samples is not None else None
                row += length
                try:
                    yield self._record(tables, tokens, about, where, number)
                except Unusable as error:
                    yield Dropped(0, where, error.reason, error.detail)

    def _boundaries(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yield the sequences' lengths and what is known of each; None stands for rows left over at the end."""
        left = self.rows
        if self.sidecar.exists():
            for number, line in read_lines(self.sidecar):
                about = _parse(line, f"{self.sidecar}:{number}")
                length = about.get("num_tokens") if isinstance(about, dict) else None
                if type(length) is not int or not 1 <= length <= left:
                    raise ConfigurationError(f"{self.sidecar}:{number}: num_tokens {length}, wanted 1..{left} rows")
                left -= length
                yield length, about
        else:
            length = self.settings.sequence_length or 0
            while left >= length:
                left -= length
                yield length, {}
        if left:
            yield left, None

    def _record(
        self,
        tables: list[pa.Table],
        tokens: pa.Table | None,
        about: dict[str, Any],
        where: str,
        number: int,
    ) -> Record:
        ids = [_matrix(table, "indices") for table in tables]
        widths = {array.shape[1] for array in ids}
        if len(widths) > 1:
            raise Unusable("experts per token vary", f"layers name {', '.join(map(str, sorted(widths)))} experts")
        weights = [_matrix(table, "scores") for table in tables if "scores" in table.column_names]
        if weights and [array.shape for array in weights] != [array.shape for array in ids]:
            raise Unusable("weights do not fit the experts", "scores and indices differ in length")
        if tokens is not None and tokens["token_id"].null_count:
            raise Unusable("not a record", "a token id is missing")
        return Record(
            file=0,
            where=where,
            row=number,
            dataset=as_text(about.get("dataset") or self.settings.dataset or self.capture.parent.parent.name),
            key=as_text(about.get("id", number)),
            ids_TLK=np.stack(ids, axis=1),
            weights_TLK=np.stack(weights, axis=1) if weights else None,
            moe_layers=tuple(self.layers),
            token_ids_T=None if tokens is None else tokens["token_id"].to_numpy().astype(np.int32),
            tokens_T=as_strings(about.get("tokens")),
            phase_T=as_phases(about.get("phase"), len(ids[0])),
        )


def write(sequences: Iterable[SequenceTrace], spec: TraceSpec, folder: Path) -> None:
    """Write `samples/`, `actives/iter_0000/` and `sequences.jsonl.gz`."""
    capture = folder / "actives" / "iter_0000"
    capture.mkdir(parents=True)
    (folder / "samples").mkdir()
    weighted = "weights" in spec.store
    columns = {"scores": pa.list_(pa.float16())} if weighted else {}
    ids = np.int16 if spec.num_experts <= 2**15 else np.int32
    schema = pa.schema({**columns, "indices": pa.list_(pa.from_numpy_dtype(ids))})
    with ExitStack() as stack:
        files = [
            stack.enter_context(_Grouped(capture / f"layer_{layer + FIRST_LAYER:02d}.parquet", schema))
            for layer in spec.moe_layers
        ]
        samples = stack.enter_context(_Grouped(folder / "samples" / "000.parquet", pa.schema({"token_id": pa.int32()})))
        sidecar = stack.enter_context(JsonLinesWriter(folder / SIDECAR))
        for sequence in sequences:
            for layer, file in enumerate(files):
                values = {"indices": _lists(sequence.expert_ids_TLK[:, layer].astype(ids))}
                if sequence.routing_weights_TLK is not None:
                    values["scores"] = _lists(sequence.routing_weights_TLK[:, layer])
                file.write(values)
            samples.write({"token_id": pa.array(sequence.token_ids_T)})
            about: dict[str, Any] = {"num_tokens": sequence.num_tokens, "dataset": sequence.dataset}
            about |= {"id": sequence.sequence_key, "phase": phase_value(sequence.phase_T)}
            if any(sequence.tokens_T):
                about["tokens"] = sequence.tokens_T
            sidecar.write(about)


class _Rows:
    """The rows of Parquet files one after the other, some at a time."""

    def __init__(self, paths: list[Path], columns: tuple[str, ...]) -> None:
        self._paths, self._columns = paths, columns
        self._batches = self._read()
        self._ready: list[pa.RecordBatch] = []

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def _read(self) -> Any:
        for path in self._paths:
            with pq.ParquetFile(path) as file:
                names = [name for name in self._columns if name in file.schema_arrow.names]
                try:
                    yield from file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names)
                except (pa.ArrowException, OSError) as error:
                    raise ConfigurationError(f"{path}: can not be read ({error}); fetch the file again") from error

    def take(self, count: int) -> pa.Table:
        """Return the next `count` rows; there are as many, or the files' footers lie."""
        while sum(batch.num_rows for batch in self._ready) < count:
            batch = next(self._batches, None)
            if batch is None:
                raise ConfigurationError(f"{self._paths[0]}: ends before the rows that its footer promises")
            self._ready.append(batch)
        table = pa.Table.from_batches(self._ready)
        self._ready = table.slice(count).to_batches()
        return table.slice(0, count).combine_chunks()


class _Grouped:
    """A Parquet file written in row groups of about 64k rows, whatever the sequences' lengths."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._pending = schema, list[pa.Table]()
        self._file = pq.ParquetWriter(path, schema, compression="zstd")

    def __enter__(self) -> "_Grouped":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def write(self, columns: dict[str, pa.Array]) -> None:
        """Add some rows."""
        self._pending.append(pa.table(columns, schema=self._schema))
        if sum(table.num_rows for table in self._pending) >= 8 * ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._file.write_table(pa.concat_tables(self._pending))
        self._pending = []


def _parse(line: bytes, where: str) -> Any:
    try:
        return parse_json(line)
    except Unusable as error:
        raise ConfigurationError(f"{where}: {error}; export the traces again") from error


def _find_capture(path: Path) -> Path:
    """Return the folder of layer files that a path means: itself, or the only one below a model's folder."""
    if path.is_dir() and any(LAYER_FILE.fullmatch(each.name) for each in path.iterdir()):
        return path.absolute()
    captures = sorted((path / "actives").glob("*/")) if path.is_dir() else []
    if len(captures) == 1 and any(LAYER_FILE.fullmatch(each.name) for each in captures[0].iterdir()):
        return captures[0].absolute()
    found = f"several captures, {', '.join(each.name for each in captures)}" if captures else "no layer_NN.parquet"
    raise ConfigurationError(f"{path}: {found}; name one folder of layer files, e.g. flame-moe-290m/actives/iter_5473")


def _equal_rows(layers: dict[int, Path], samples: list[Path]) -> int:
    """Return the rows of each layer file; raises ConfigurationError where files differ, for then no row is certain."""
    rows = {path: _rows_of(path, "indices", pa.types.is_integer) for path in layers.values()}
    first, count = next(iter(rows.items()))
    for path, found in rows.items():
        if found != count:
            raise ConfigurationError(f"{path}: {found} rows, {first.name} has {count}; rows can not be lined up")
    tokens = sum(_rows_of(path, "token_id", pa.types.is_integer) for path in samples)
    if samples and tokens != count:
        raise ConfigurationError(
            f"{samples[0].parent}: {tokens} rows, {first.name} has {count}; rows can not be lined up; "
            "fetch all samples, or move the folder away to do without token ids"
        )
    return count


def _rows_of(path: Path, column: str, fits: Callable[[pa.DataType], bool]) -> int:
    """Return a file's rows; raises ConfigurationError unless it has the column, of the right type."""
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(f"{path}: no Parquet file ({error}); fetch it again") from error
    kind = schema.field(column).type if column in schema.names else None
    if kind is None or not fits(getattr(kind, "value_type", kind)):
        raise ConfigurationError(f"{path}: column {column} is {kind or 'missing'}; wanted FLAME's {column}")
    return int(rows)


def _matrix(table: pa.Table, name: str) -> NDArray[Any]:
    """Return a list column as [rows, K]; raises Unusable where a list is missing or of another length."""
    column = table[name]
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    lengths = pc.list_value_length(array)
    values = array.flatten()
    first = lengths[0].as_py() if len(lengths) else None
    if lengths.null_count or values.null_count or pc.any(pc.not_equal(lengths, first)).as_py():
        raise Unusable("experts per token vary", f"{name} are not lists of one length")
    matrix: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(array), first)
    return matrix


def _lists(values: NDArray[Any]) -> pa.Array:
    """Return [rows, K] as a list column."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))
