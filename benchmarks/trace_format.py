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
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

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


class Layout:
    """One way to store routing: `write` fills a folder, `read` gives tensors from it."""

    name: ClassVar[str]

    def write(self, routing: Routing, folder: Path) -> None:
        """Write all of `routing` below `folder`."""
        raise NotImplementedError

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        """Yield tensors [T, L, K], part by part in stored order."""
        raise NotImplementedError


class Pickle(Layout):
    name = "pickle of int64 and float32 tensors, one a sequence"

    def write(self, routing: Routing, folder: Path) -> None:
        bounds = np.cumsum(routing.lengths_S)[:-1]
        parts = [np.split(values, bounds) for values in routing.columns().values()]
        tensors = [
            [torch.from_numpy(v.astype(np.float32 if v.dtype == np.float16 else np.int64)) for v in p] for p in parts
        ]
        (folder / "all.pkl").write_bytes(pickle.dumps(tensors))

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        with (folder / "all.pkl").open("rb") as file:
            parts = pickle.load(file)
        for sequence in zip(*parts, strict=True):
            yield dict(zip(("ids", "weights"), sequence, strict=False))


class Table(Layout):
    """A Parquet layout of one file."""

    def options_for(self, routing: Routing) -> dict[str, object]:
        """Return Parquet settings beside compression."""
        return {}

    def table(self, routing: Routing) -> pa.Table:
        """Return the rows to write."""
        raise NotImplementedError

    def values(self, column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
        """Return a read column's numbers, flat."""
        raise NotImplementedError

    def row_group(self, routing: Routing) -> int:
        """Rows of a row group that stand for ROWS tokens."""
        return ROWS

    def write(self, routing: Routing, folder: Path) -> None:
        pq.write_table(
            self.table(routing),
            folder / "all.parquet",
            compression="zstd",
            compression_level=3,
            row_group_size=self.row_group(routing),
            **self.options_for(routing),
        )

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        with pq.ParquetFile(folder / "all.parquet") as file:
            names = [name for name in file.schema_arrow.names if name in ("ids", "weights")]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=names)
                yield {
                    name: torch.from_numpy(
                        self.values(table[name], spec.id_dtype if name == "ids" else np.dtype(np.float16)).reshape(
                            -1, spec.num_layers, spec.top_k
                        )
                    )
                    for name in names
                }


def _flat(column: pa.ChunkedArray) -> NDArray:
    arrays = [chunk.flatten() if pa.types.is_nested(chunk.type) else chunk for chunk in column.chunks]
    return _join([array.to_numpy(zero_copy_only=True) for array in arrays])


def _join(parts: list[NDArray]) -> NDArray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _binary(column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
    """Return what binary values hold, end to end, straight from Arrow's buffers."""
    parts = []
    for chunk in column.chunks:
        if pa.types.is_fixed_size_binary(chunk.type):
            start, stop = chunk.offset * chunk.type.byte_width, (chunk.offset + len(chunk)) * chunk.type.byte_width
            parts.append(np.frombuffer(chunk.buffers()[1], np.uint8)[start:stop])
        else:
            offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            parts.append(np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
    return _join(parts).view(dtype)


class Scalars(Table):
    name = "row per token, layer and rank, scalars"

    def table(self, routing: Routing) -> pa.Table:
        tokens = len(routing.ids_TLK)
        keys = {
            "token": np.repeat(np.arange(tokens, dtype=np.uint32), routing.width),
            "layer": np.tile(np.repeat(np.arange(routing.spec.num_layers, dtype=np.uint8), routing.spec.top_k), tokens),
        }
        return pa.table(keys | {name: values.reshape(-1) for name, values in routing.columns().items()})

    def row_group(self, routing: Routing) -> int:
        return ROWS * routing.width

    def values(self, column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
        return _flat(column)


class Lists(Table):
    name = "row per token, fixed-size lists, default encodings"

    def table(self, routing: Routing) -> pa.Table:
        return pa.table(
            {
                name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), routing.width)
                for name, values in routing.columns().items()
            }
        )

    def values(self, column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
        return _flat(column)


class SplitLists(Lists):
    name = "the same, weights byte-stream-split, ids dictionary"

    def options_for(self, routing: Routing) -> dict[str, object]:
        if routing.weights_TLK is None:
            return {}
        return {
            "use_dictionary": ["ids.list.element"],
            "column_encoding": {"weights.list.element": "BYTE_STREAM_SPLIT"},
        }


class FixedBinary(Table):
    name = "row per token, fixed-size binary"

    def options_for(self, routing: Routing) -> dict[str, object]:
        return {"use_dictionary": False}

    def table(self, routing: Routing) -> pa.Table:
        def column(values: NDArray) -> pa.Array:
            buffer = pa.py_buffer(np.ascontiguousarray(values))
            return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values[0].nbytes), len(values), [None, buffer])

        return pa.table({name: column(values) for name, values in routing.columns().items()})

    def values(self, column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
        return _binary(column, dtype)


class SplitBinary(FixedBinary):
    name = "the same, byte-stream-split"

    def options_for(self, routing: Routing) -> dict[str, object]:
        return {
            "use_dictionary": False,
            "column_encoding": dict.fromkeys(routing.columns(), "BYTE_STREAM_SPLIT"),
        }


class SequenceBinary(Table):
    name = "row per sequence, binary"

    def options_for(self, routing: Routing) -> dict[str, object]:
        return {"use_dictionary": False}

    def table(self, routing: Routing) -> pa.Table:
        bounds = np.cumsum(routing.lengths_S)[:-1]
        return pa.table(
            {
                name: pa.array([part.tobytes() for part in np.split(values, bounds)], pa.binary())
                for name, values in routing.columns().items()
            }
        )

    def row_group(self, routing: Routing) -> int:
        return max(int(ROWS / routing.lengths_S.mean()), 1)

    def values(self, column: pa.ChunkedArray, dtype: np.dtype) -> NDArray:
        return _binary(column, dtype)


class FilePerLayer(Layout):
    name = "one file per layer, lists (FLAME's)"

    def write(self, routing: Routing, folder: Path) -> None:
        for layer in range(routing.spec.num_layers):
            table = pa.table(
                {
                    name: pa.FixedSizeListArray.from_arrays(pa.array(values[:, layer].reshape(-1)), routing.spec.top_k)
                    for name, values in routing.columns().items()
                }
            )
            pq.write_table(
                table, folder / f"{layer}.parquet", compression="zstd", compression_level=3, row_group_size=ROWS
            )

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        files = [pq.ParquetFile(folder / f"{layer}.parquet") for layer in range(spec.num_layers)]
        for group in range(files[0].num_row_groups):
            tables = [file.read_row_group(group) for file in files]
            yield {
                name: torch.from_numpy(np.stack([_flat(t[name]).reshape(-1, spec.top_k) for t in tables], axis=1))
                for name in tables[0].column_names
            }
        for file in files:
            file.close()


class Ours(Layout):
    """The run folder itself, as it lies there."""

    name = "this format, columns"

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        columns = {"ids": "expert_ids", "weights": "routing_weights"}
        names = {name: column for name, column in columns.items() if column in spec.shapes}
        for shard in TraceDataset(folder).shards:
            for group in range(shard.num_row_groups):
                arrays = shard.lists(group, list(names.values()))
                yield {name: torch.from_numpy(arrays[column]) for name, column in names.items()}


class OursBySequence(Ours):
    name = "this format, sequence by sequence"

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        for trace in TraceDataset(folder).sequences():
            tensors = {"ids": torch.from_numpy(trace.expert_ids_TLK)}
            if trace.routing_weights_TLK is not None:
                tensors["weights"] = torch.from_numpy(trace.routing_weights_TLK)
            yield tensors


class OursThroughArrow(Ours):
    name = "this format, read by Arrow"

    def read(self, folder: Path, spec: TraceSpec) -> Iterator[Tensors]:
        columns = {"expert_ids": "ids", "routing_weights": "weights"}
        names = [name for name in columns if name in spec.shapes]
        for path in TraceDataset(folder).shard_paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=names)
                    shape = (-1, spec.num_layers, spec.top_k)
                    yield {columns[name]: torch.from_numpy(_flat(table[name]).reshape(shape)) for name in names}


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
            for layout in (
                *(Ours(), OursBySequence(), OursThroughArrow(), SequenceBinary(), FixedBinary(), SplitBinary()),
                *(Lists(), SplitLists(), Scalars(), FilePerLayer(), Pickle()),
            ):
                folders[layout] = shard_dir if isinstance(layout, Ours) else Path(temporary) / type(layout).__name__
                if folders[layout] != shard_dir:
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
            ours = routing_bytes(dataset)
            sizes = {
                layout: ours if folder == shard_dir else sum(path.stat().st_size for path in folder.iterdir())
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
