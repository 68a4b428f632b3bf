"""Finds the first thing that is wrong with one shard: its bytes, its footer, its rows, its values.

The file is read twice at most: whole, for its sha256, and row group by row group, decoded. Each list column is decoded
by `pages` and by Arrow, which must agree. Memory: one row group.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from groundwork.errors import ExpertSpeculationError
from traces.checksums import file_sha256
from traces.claims import chunk_range
from traces.faults import COLLECT_AGAIN, MOVE_AWAY, Fault, FaultError, first_line, unread
from traces.index import check_shard
from traces.manifest import ManifestLine
from traces.plain_files import open_plain
from traces.plan import Plan
from traces.schema import PHASES, ROUTER_INPUT, arrow_schema, routing_fault
from traces.shards import DOUBTS, Shard, parse_shard, strings


def shard_fault(path: Path, line: ManifestLine | None, plan: Plan | None) -> Fault | None:
    """Return what is wrong with a shard, or None; compared with its manifest line and the plan where they are given."""
    try:
        return _fault(path, line, plan)
    except FaultError as error:
        return error.fault
    except (ExpertSpeculationError, *DOUBTS) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            return unread(path, cause)
        if isinstance(cause, MemoryError):
            return Fault(path, "takes more memory than there is", "verify it on a larger machine", proven=False)
        return Fault(path, f"not a sound shard ({first_line(cause)})", COLLECT_AGAIN)


def _fault(path: Path, line: ManifestLine | None, plan: Plan | None) -> Fault | None:
    with open_plain(path) as file:
        start = file.read(4)
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        footer = size - 8 - int.from_bytes(file.read(4), "little")
    if line is not None and size != line.bytes:
        return Fault(path, f"has {size} bytes, its manifest line says {line.bytes}", COLLECT_AGAIN)
    if line is not None and file_sha256(path) != line.sha256:
        return Fault(path, "its sha256 differs from its manifest line", COLLECT_AGAIN)
    shard = parse_shard(path, line)
    if plan is not None and shard.spec != plan.spec:
        return Fault(path, f"its footer is of another run (plan {shard.spec.plan_fingerprint})", MOVE_AWAY)
    if plan is not None and plan.shards[shard.planned.index : shard.planned.index + 1] != [shard.planned]:
        return Fault(path, "its footer's range is not the planned one", COLLECT_AGAIN)
    problem = "does not begin as Parquet does" if start != b"PAR1" else _gap(shard, footer)
    for group, found in enumerate(check_shard(shard)):
        if problem:
            break
        table = shard.table(group, [name for name in arrow_schema(shard.spec).names if name not in shard.spec.widths])
        problem = (
            _name_fault(table, found, plan)
            or _statistics_fault(shard, group, table)
            or _value_fault(shard, group, table)
        )
        if ROUTER_INPUT in table.column_names:
            problem = problem or _hidden_fault(shard, table[ROUTER_INPUT].combine_chunks())
        problem = problem and f"row group {group}: {problem}"
    return Fault(path, problem, COLLECT_AGAIN) if problem else None


def _gap(shard: Shard, footer: int) -> str | None:
    """Say where there are bytes that belong to no column: ours stand one after the other from byte 4 to the footer."""
    at = 4
    groups = map(shard.metadata.row_group, range(shard.num_row_groups))
    chunks = [chunk_range(group.column(number)) for group in groups for number in range(group.num_columns)]
    for start, length in [*chunks, (footer, 0)]:
        if start != at:
            return f"bytes {at} to {start} belong to no column, or to two"
        at += length
    return None


def _name_fault(table: pa.Table, found: dict[str, Any], plan: Plan | None) -> str | None:
    """Compare a row group's sequences with the planned ones."""
    if plan is None:
        return None
    first, count = int(found["sequence_id"][0]), len(found["sequence_id"])
    planned = plan.sequences.slice(first, count)
    if planned.num_rows < count:
        return f"sequence {plan.sequences.num_rows} is not planned"
    starts = pa.array(found["row_offset"])
    own = [strings(table[name].take(starts)) for name in ("dataset", "sequence_key")]
    wanted = [planned[name].to_pylist() for name in ("dataset", "sequence_key", "num_tokens")]
    for number, (have, want) in enumerate(
        zip(zip(*own, found["num_tokens"].tolist(), strict=True), zip(*wanted, strict=True), strict=True), start=first
    ):
        if have != want:
            return f"sequence {number} is not the planned one"
    return None


def _statistics_fault(shard: Shard, group: int, table: pa.Table) -> str | None:
    """Compare the footer's statistics, by which other programs skip row groups, with the values."""
    for number, name in enumerate(arrow_schema(shard.spec).names):
        statistics = shard.metadata.row_group(group).column(number).statistics
        if statistics is None or name not in table.column_names:  # the list columns have none
            continue
        values = table[name].unique()
        values = pa.chunked_array([values.dictionary_decode()]) if pa.types.is_dictionary(values.type) else values
        extremes = pc.min_max(values)
        if statistics.has_min_max and (extremes["min"].as_py(), extremes["max"].as_py()) != (
            statistics.min,
            statistics.max,
        ):
            return f"{name} is not within its statistics in the footer"
    return None


def _hidden_fault(shard: Shard, column: pa.BinaryArray) -> str | None:
    """Check that the router inputs of a row group are as many as were to be sampled, and numbers of all layers."""
    spec, values = shard.spec, column.drop_null()
    if abs(len(values) - spec.hidden_fraction * len(column)) >= 2:  # less than 1, but for rounding
        return f"{len(values)} of {len(column)} tokens have a router_input, wanted {spec.hidden_fraction:g} of them"
    if not pc.all(pc.equal(pc.binary_length(values), 2 * spec.num_layers * spec.hidden_size), min_count=0).as_py():
        return f"a router_input that is not of {spec.num_layers} layers and {spec.hidden_size} numbers"
    if not np.isfinite(np.frombuffer(b"".join(values.to_pylist()), "<f2")).all():
        return "router_input holds values that are not finite"
    return None


def _value_fault(shard: Shard, group: int, table: pa.Table) -> str | None:
    """Check the values of a row group, as `pages` and Arrow decode them."""
    spec = shard.spec
    if table["phase"].to_numpy().max() > max(PHASES.values()):
        return f"a phase that is none of {PHASES}"
    routing: dict[str, NDArray[Any]] = {}
    for name in spec.shapes:
        values = shard.agreed_list(group, name)
        if name in ("expert_ids", "routing_weights"):
            routing[name] = values
        elif not np.isfinite(values).all():
            return f"{name} holds values that are not finite"
        if name == "lookahead_logits" and any(values[:, h - 1, :h].any() for h in range(1, spec.horizons + 1)):
            return "lookahead_logits are not zero where a layer has no source"
    return routing_fault(spec, routing["expert_ids"], routing.get("routing_weights"))
