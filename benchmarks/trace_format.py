"""How small and how fast is the trace format? Prints a table of layouts of the same routing, measured in one run.

    .venv/bin/python benchmarks/trace_format.py --shard_dir RUN [--shard_dir RUN ...]

Every layout holds all expert ids and, where the run has them, all routing weights, zstd level 3, row groups of 65,536
tokens. Bytes are per token and count routing only; `x floor` is against the order-0 entropy of each (layer, rank)
column, ids and weights taken as whole symbols. Reading is from the page cache into torch tensors [T, L, K], a row group
at a time, best of the repeats in turns, on one core and on all with the threads that each library uses by itself; the
rate is bytes of ids and float16 weights in the tensors per second. `this format` is read with page and chunk checksums,
the others without. Its second line is the whole reader, sequence by sequence with token ids, keys, phases and splits,
as training sees it.
"""

import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.stats import entropy

from groundwork.atomic import write_json
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec

ROWS = 65536
COLUMNS = {"ids": "expert_ids", "weights": "routing_weights"}  # as they are called here and in this format
ZSTD = {"compression": "zstd", "compression_level": 3}
Tensors = dict[str, torch.Tensor]  # "ids" and, where the run has them, "weights"


class Routing:
    """All routing of a run in memory: ids [T, L, K], weights [T, L, K] or None, and where sequences start."""

    def __init__(self, dataset: TraceDataset) -> None:
        traces: list[SequenceTrace] = list(dataset.sequences())
        self.spec: TraceSpec = dataset.spec
        self.ids_TLK = np.concatenate([trace.expert_ids_TLK for trace in traces])
        weights = [trace.routing_weights_TLK for trace in traces if trace.routing_weights_TLK is not None]
        self.weights_TLK = np.concatenate(weights) if weights else None
        self.lengths_S = np.array([trace.num_tokens for trace in traces])

    @property
    def width(self) -> int:
        """Numbers per token and column, L * K."""
        return self.spec.num_layers * self.spec.top_k

    @property
    def raw_bytes(self) -> int:
        """Bytes of ids and float16 weights."""
        return self.ids_TLK.nbytes + (0 if self.weights_TLK is None else self.weights_TLK.nbytes)

    def columns(self) -> dict[str, NDArray]:
        """Return the arrays that exist, by name."""
        return {"ids": self.ids_TLK} | ({} if self.weights_TLK is None else {"weights": self.weights_TLK})

    def floor(self) -> float:
        """Bytes per token of the order-0 entropy of every (layer, rank) column."""
        bits = 0.0
        for values in self.columns().values():
            for column in values.reshape(len(values), -1).T:
                symbols = column.view(np.uint16) if column.dtype == np.float16 else column
                bits += float(entropy(np.unique(symbols, return_counts=True)[1], base=2))
        return bits / 8


@dataclass(frozen=True)
class Layout:
    """One way to store routing: `write` fills a folder (None: the run folder as it lies there), `read` gives tensors.

    `read` yields tensors [T, L, K], part by part in stored order.
    """

    name: str
    write: Callable[[Routing, Path], None] | None
    read: Callable[[Path, TraceSpec], Iterator[Tensors]]


def ours(folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
    """Read this format's columns, a row group at a time."""
    names = {name: column for name, column in COLUMNS.items() if column in spec.shapes}
    for shard in TraceDataset(folder).shards:
        for group in range(shard.num_row_groups):
            arrays = shard.lists(group, list(names.values()))
            yield {name: torch.from_numpy(arrays[column]) for name, column in names.items()}


def ours_by_sequence(folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
    """Read this format as training does."""
    for trace in TraceDataset(folder).sequences():
        values = {"ids": trace.expert_ids_TLK, "weights": trace.routing_weights_TLK}
        yield {name: torch.from_numpy(each) for name, each in values.items() if each is not None}


def ours_by_arrow(folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
    """Read this format's files with Arrow alone."""
    for path in TraceDataset(folder).shard_paths:
        yield from read_parquet(path, spec, COLUMNS)


def read_parquet(path: Path, spec: TraceSpec, columns: Mapping[str, str] | None = None) -> Iterator[Tensors]:
    """Read one file's ids and weights with Arrow; `columns` are their names in the file, where they are others."""
    names = columns or {name: name for name in COLUMNS}
    with pq.ParquetFile(path) as file:
        names = {name: column for name, column in names.items() if column in file.schema_arrow.names}
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(names.values()))
            yield {
                name: torch.from_numpy(
                    numbers(table[column], spec.id_dtype if name == "ids" else np.dtype(np.float16)).reshape(
                        -1, spec.num_layers, spec.top_k
                    )
                )
                for name, column in names.items()
            }


def numbers(column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
    """Return a column's numbers, flat; what binary values hold comes end to end, straight from Arrow's buffers."""
    parts = []
    for chunk in column.chunks:
        if pa.types.is_fixed_size_binary(chunk.type):
            start, stop = chunk.offset * chunk.type.byte_width, (chunk.offset + len(chunk)) * chunk.type.byte_width
            parts.append(np.frombuffer(chunk.buffers()[1], np.uint8)[start:stop])
        elif pa.types.is_binary(chunk.type):
            offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            parts.append(np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
        else:
            flat = chunk.flatten() if pa.types.is_nested(chunk.type) else chunk
            parts.append(flat.to_numpy(zero_copy_only=True))
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).view(dtype)


def parquet(
    name: str,
    columns: Callable[[Routing], dict[str, pa.Array]],
    rows: Callable[[Routing], int] = lambda routing: ROWS,
    **options: object,
) -> Layout:
    """Return a layout of one Parquet file, of row groups of `rows`, which stand for ROWS tokens."""

    def write(routing: Routing, folder: Path) -> None:
        # Options that name columns hold for those that the run has.
        given = {key: kept_columns(value, routing) for key, value in options.items()}
        table = pa.table(columns(routing))
        pq.write_table(table, folder / "all.parquet", row_group_size=rows(routing), **ZSTD, **given)

    return Layout(name, write, lambda folder, spec: read_parquet(folder / "all.parquet", spec))


def kept_columns(option: object, routing: Routing) -> object:
    """Return a Parquet option without the columns that the run lacks."""
    present = routing.columns()
    if isinstance(option, dict):
        return {column: value for column, value in option.items() if column.partition(".")[0] in present} or None
    return option


def scalars(routing: Routing) -> dict[str, pa.Array]:
    """Return one row per token, layer and rank."""
    tokens, spec = len(routing.ids_TLK), routing.spec
    layer = np.tile(np.repeat(np.arange(spec.num_layers, dtype=np.uint8), spec.top_k), tokens)
    keys = {"token": np.repeat(np.arange(tokens, dtype=np.uint32), routing.width), "layer": layer}
    return {name: pa.array(each.reshape(-1)) for name, each in (keys | routing.columns()).items()}


def lists(routing: Routing) -> dict[str, pa.Array]:
    """Return one row per token, of fixed-size lists."""
    return {name: as_lists(values, routing.width) for name, values in routing.columns().items()}


def as_lists(values: NDArray, width: int) -> pa.Array:
    """Return an array's numbers in lists of `width`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)


def fixed_binary(routing: Routing) -> dict[str, pa.Array]:
    """Return one row per token, of bytes."""
    return {
        name: pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(values[0].nbytes), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
        )
        for name, values in routing.columns().items()
    }


def sequence_binary(routing: Routing) -> dict[str, pa.Array]:
    """Return one row per sequence, of bytes."""
    bounds = np.cumsum(routing.lengths_S)[:-1]
    return {
        name: pa.array([part.tobytes() for part in np.split(values, bounds)], pa.binary())
        for name, values in routing.columns().items()
    }


def write_layers(routing: Routing, folder: Path) -> None:
    """Write one file of lists per layer."""
    for layer in range(routing.spec.num_layers):
        columns = {name: as_lists(each[:, layer], routing.spec.top_k) for name, each in routing.columns().items()}
        pq.write_table(pa.table(columns), folder / f"{layer}.parquet", row_group_size=ROWS, **ZSTD)


def read_layers(folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
    """Read the files of all layers side by side."""
    one = replace(spec, num_layers=1, moe_layers=(0,), store=(), horizons=0, lookahead_norm=None)
    one = replace(one, hidden_size=0, hidden_fraction=0.0)
    files = [read_parquet(folder / f"{layer}.parquet", one) for layer in range(spec.num_layers)]
    for parts in zip(*files, strict=True):
        yield {name: torch.from_numpy(np.concatenate([part[name] for part in parts], axis=1)) for name in parts[0]}


def write_pickle(routing: Routing, folder: Path) -> None:
    """Write what torch would be given: int64 and float32."""
    bounds = np.cumsum(routing.lengths_S)[:-1]
    wide = {"ids": np.int64, "weights": np.float32}
    sequences = {
        name: [torch.from_numpy(part.astype(wide[name])) for part in np.split(values, bounds)]
        for name, values in routing.columns().items()
    }
    (folder / "all.pkl").write_bytes(pickle.dumps(sequences))


def read_pickle(folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
    """Read all, then give it sequence by sequence."""
    with (folder / "all.pkl").open("rb") as file:
        sequences = pickle.load(file)
    for parts in zip(*sequences.values(), strict=True):
        yield dict(zip(sequences, parts, strict=True))


LAYOUTS = (
    Layout("this format, columns", None, ours),
    Layout("this format, sequence by sequence", None, ours_by_sequence),
    Layout("this format, read by Arrow", None, ours_by_arrow),
    parquet(
        "row per sequence, binary",
        sequence_binary,
        lambda routing: max(int(ROWS / routing.lengths_S.mean()), 1),
        use_dictionary=False,
    ),
    parquet("row per token, fixed-size binary", fixed_binary, use_dictionary=False),
    parquet(
        "the same, byte-stream-split",
        fixed_binary,
        use_dictionary=False,
        column_encoding=dict.fromkeys(COLUMNS, "BYTE_STREAM_SPLIT"),
    ),
    parquet("row per token, fixed-size lists, default encodings", lists),
    parquet(
        "the same, weights byte-stream-split, ids dictionary",
        lists,
        use_dictionary=["ids.list.element"],
        column_encoding={"weights.list.element": "BYTE_STREAM_SPLIT"},
    ),
    parquet("row per token, layer and rank, scalars", scalars, lambda routing: ROWS * routing.width),
    Layout("one file per layer, lists (FLAME's)", write_layers, read_layers),
    Layout("pickle of int64 and float32 tensors, one a sequence", write_pickle, read_pickle),
)


def routing_bytes(dataset: TraceDataset) -> int:
    """Bytes of ids and weights in a run's shards."""
    paths = {"expert_ids.list.element", "routing_weights.list.element"}
    total = 0
    for shard in dataset.shards:
        for group in map(shard.metadata.row_group, range(shard.num_row_groups)):
            columns = map(group.column, range(shard.metadata.num_columns))
            total += sum(c.total_compressed_size for c in columns if c.path_in_schema in paths)
    return total


def check(layout: Layout, folder: Path, routing: Routing) -> None:
    """Raise AssertionError unless the layout gives back what was stored."""
    parts = list(layout.read(folder, routing.spec))
    for name, values in routing.columns().items():
        assert np.array_equal(torch.cat([part[name] for part in parts]).numpy(), values), layout.name


def seconds_to_read(layout: Layout, folder: Path, spec: TraceSpec) -> float:
    """Time one reading, part by part, each freed before the next."""
    started = time.perf_counter()
    for _ in layout.read(folder, spec):
        pass
    return time.perf_counter() - started


def set_cores(cores: set[int]) -> None:
    """Let every thread of this process run on these cores only; new threads inherit it."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


@click.command()
@click.option("--shard_dir", "shard_dirs", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures there.")
def main(shard_dirs: tuple[Path, ...], repeats: int, json_file: Path | None) -> None:
    """Print size and read rate of this format and of others, for each run folder."""
    results = {}
    for shard_dir in shard_dirs:
        dataset = TraceDataset(shard_dir)
        routing = Routing(dataset)
        tokens, floor = len(routing.ids_TLK), routing.floor()
        spec = dataset.spec
        click.echo(
            f"\n{spec.model_name}: {tokens:,} tokens, L {spec.num_layers}, E {spec.num_experts}, K {spec.top_k}, "
            f"{'ids and weights' if routing.weights_TLK is not None else 'ids'}, "
            f"{routing.raw_bytes / tokens:.0f} raw bytes a token; whole shards "
            f"{sum(path.stat().st_size for path in dataset.shard_paths) / tokens:.1f} with strings and keys\n"
        )
        cores = f"{len(os.sched_getaffinity(0))} cores"
        click.echo(f"| layout | bytes/token | x floor | GB/s, 1 core | {cores} | ours / its, 1 core | {cores} |")
        click.echo("|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as temporary:
            folders: dict[Layout, Path] = {}
            for number, layout in enumerate(LAYOUTS):
                folders[layout] = shard_dir if layout.write is None else Path(temporary) / str(number)
                if layout.write is not None:
                    folders[layout].mkdir()
                    layout.write(routing, folders[layout])
                check(layout, folders[layout], routing)
            best = {layout: [math.inf, math.inf] for layout in folders}
            everywhere = os.sched_getaffinity(0)
            for _ in range(repeats):
                for number, allowed in enumerate(({min(everywhere)}, everywhere)):
                    set_cores(allowed)
                    for layout, folder in folders.items():
                        best[layout][number] = min(best[layout][number], seconds_to_read(layout, folder, spec))
            our_bytes = routing_bytes(dataset)
            sizes = {
                layout: our_bytes if folder == shard_dir else sum(path.stat().st_size for path in folder.iterdir())
                for layout, folder in folders.items()
            }
        rows = [
            (each.name, sizes[each] / tokens, *(routing.raw_bytes / seconds / 1e9 for seconds in best[each]))
            for each in folders
        ]
        for name, size, one, all_cores in rows:
            ratios = f"{rows[0][2] / one:.2f} | {rows[0][3] / all_cores:.2f}"
            click.echo(f"| {name} | {size:.1f} | {size / floor:.3f} | {one:.2f} | {all_cores:.2f} | {ratios} |")
        click.echo(f"| order-0 entropy (floor) | {floor:.1f} | 1 | | | | |")
        keys = ("layout", "bytes_per_token", "gb_per_s_one_core", "gb_per_s")
        results[spec.model_name] = {"floor": floor, "layouts": [dict(zip(keys, row, strict=True)) for row in rows]}
    if json_file is not None:
        write_json(json_file, results)


if __name__ == "__main__":
    main()
