"""What a run will do, decided before any model work: `plan.json` (spec, settings, sources, shard ranges) and
`plan.parquet` (one row per sequence).

plan.json is written last and holds the checksum of plan.parquet and a digest of itself, and is compared as bytes when
loaded: a run either has a whole, unchanged plan or none. A plan may come from anyone, so nothing in it is believed
before its size is: plan.json has a limit, and plan.parquet is held against plan.json and its own size first.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from groundwork.atomic import write_bytes
from groundwork.errors import ConfigurationError
from traces.faults import Fault, FaultError, first_line, unread
from traces.manifest import canonical_json, shard_name
from traces.plain_files import open_plain, read_plain
from traces.plan_table import read_plan_table
from traces.schema import TraceSpec

PLAN_NAME = "plan.json"
SEQUENCES_NAME = "plan.parquet"
PLAN_LIMIT = 16 * 2**20  # bytes: 150,000 shards; parsed it takes up to 25 times as much

SEQUENCES_SCHEMA = pa.schema(
    [
        pa.field("sequence_id", pa.uint32(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("sequence_key", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("batch", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class PlannedShard:
    """One shard's sequences, as a half-open range of sequence ids, and their tokens."""

    index: int
    first_sequence: int
    stop_sequence: int
    num_tokens: int

    def __post_init__(self) -> None:
        numbers = asdict(self).values()
        if not all(type(number) is int and 0 <= number <= 2**32 for number in numbers):
            raise ValueError(f"no shard has these numbers: {', '.join(map(repr, numbers))}")

    @property
    def name(self) -> str:
        """Return the shard's file name in `data/`."""
        return shard_name(self.index)


@dataclass(frozen=True, eq=False)
class Plan:
    """A run's plan; raises ValueError unless the shards cover the sequences without gap or overlap."""

    fingerprint: str
    spec: TraceSpec
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    shards: list[PlannedShard]
    sequences: pa.Table  # SEQUENCES_SCHEMA, by sequence_id

    def __post_init__(self) -> None:
        if self.spec.plan_fingerprint != self.fingerprint:
            raise ValueError(f"the spec names plan {self.spec.plan_fingerprint}, not {self.fingerprint}")
        if not self.sequences.schema.equals(SEQUENCES_SCHEMA):
            raise ValueError(f"the sequences' columns are not {SEQUENCES_SCHEMA.names} of the planned types")
        if not np.array_equal(self.sequences["sequence_id"].to_numpy(), np.arange(self.sequences.num_rows)):
            raise ValueError("sequence ids do not count from 0")
        tokens, shard_of = self.sequences["num_tokens"].to_numpy(), self.sequences["shard"].to_numpy()
        if (tokens < 1).any():
            raise ValueError("a sequence has no tokens")
        stop = 0
        for index, shard in enumerate(self.shards):
            own = slice(shard.first_sequence, shard.stop_sequence)
            if (shard.index, shard.first_sequence) != (index, stop) or shard.stop_sequence <= stop:
                raise ValueError(f"shard {index} does not follow its predecessor: {shard}")
            if int(tokens[own].sum()) != shard.num_tokens or (shard_of[own] != index).any():
                raise ValueError(f"shard {index} disagrees with the rows of its sequences: {shard}")
            stop = shard.stop_sequence
        if stop != self.sequences.num_rows:
            raise ValueError(f"the shards end at sequence {stop} of {self.sequences.num_rows}")

    def save(self, run_dir: Path) -> None:
        """Write plan.parquet, then plan.json, each atomically.

        Raises ConfigurationError, before anything is written, where the plan is too large to be read back.
        """
        buffer = io.BytesIO()
        pq.write_table(self.sequences, buffer, compression="zstd", write_page_checksum=True)
        plan = self._render(hashlib.sha256(buffer.getvalue()).hexdigest())
        try:
            read_plan_table(buffer, SEQUENCES_SCHEMA, self.sequences.num_rows)
            if len(plan) > PLAN_LIMIT:
                raise ValueError(f"{PLAN_NAME} takes {len(plan)} bytes, wanted {PLAN_LIMIT} at most")
        except ValueError as error:
            raise ConfigurationError(
                f"{run_dir}: the plan is too large to be read back ({error}); split the run, or make larger shards "
                "with --shard_size_mb"
            ) from error
        run_dir.mkdir(parents=True, exist_ok=True)
        write_bytes(run_dir / SEQUENCES_NAME, buffer.getvalue())
        write_bytes(run_dir / PLAN_NAME, plan)

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Read a run's plan; raises FaultError where it is missing or not what was saved."""
        path, table_path = run_dir / PLAN_NAME, run_dir / SEQUENCES_NAME
        values = _read_values(path)
        with _naming(path):
            shards = _shards(values)
            spec = TraceSpec.from_json(values["spec"])
            fingerprint_, settings, sources = values["fingerprint"], values["settings"], values["sources"]
            if not (isinstance(settings, dict) and all(isinstance(each, dict) for each in sources)):
                raise ValueError("settings or sources are not objects")
            if not re.fullmatch("[0-9a-f]{32}", fingerprint_):
                raise ValueError("its fingerprint is not 32 hexadecimal digits")
        with _naming(table_path), open_plain(table_path) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != values["sequences_sha256"]:
                raise ValueError(f"its sha256 differs from the one in {PLAN_NAME}")
            rows = shards[-1].stop_sequence if shards else 0
            sequences = read_plan_table(file, SEQUENCES_SCHEMA, rows)
        with _naming(path):
            return cls(fingerprint_, spec, settings, sources, shards, sequences)

    def _render(self, sequences_sha256: str) -> bytes:
        values = {
            "fingerprint": self.fingerprint,
            "spec": self.spec.to_json(),
            "settings": self.settings,
            "sources": self.sources,
            "shards": [asdict(shard) for shard in self.shards],
            "sequences_sha256": sequences_sha256,
        }
        return _with_digest(values)


def planned_shards(run_dir: Path) -> list[PlannedShard]:
    """Return the shards that plan.json names, without reading plan.parquet; raises as `load` does."""
    path = run_dir / PLAN_NAME
    values = _read_values(path)
    with _naming(path):
        return _shards(values)


def parse_plan(text: bytes) -> dict[str, Any]:
    """Return what plan.json's text holds; raises ValueError and others where it differs from its own digest."""
    values: dict[str, Any] = json.loads(text)
    if _with_digest({name: value for name, value in values.items() if name != "digest"}) != text:
        raise ValueError("the content differs from its own digest")
    return values


def _read_values(path: Path) -> dict[str, Any]:
    """Return what plan.json holds; raises FaultError where it is missing or differs from its own digest."""
    with _naming(path):
        return parse_plan(read_plain(path, PLAN_LIMIT))


def _shards(values: dict[str, Any]) -> list[PlannedShard]:
    return [PlannedShard(**shard) for shard in values["shards"]]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a file's content can raise into a FaultError that names it."""
    remedy = "restore the file from a copy, or collect or import again into a new folder"
    try:
        yield
    except FileNotFoundError as error:
        raise FaultError(Fault(path, "missing, so the folder holds no complete run", remedy)) from error
    except OSError as error:
        if error.errno is not None:
            raise FaultError(unread(path, error)) from error
        raise FaultError(Fault(path, f"not as it was saved ({first_line(error)})", remedy)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, pa.ArrowException) as error:
        raise FaultError(Fault(path, f"not as it was saved ({first_line(error)})", remedy)) from error


def _with_digest(values: dict[str, Any]) -> bytes:
    """Return plan.json's bytes, which hold a digest of everything else in them."""
    values = values | {"digest": fingerprint(values)}
    return json.dumps(values, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"


def cut_shards(num_tokens_S: Sequence[int], spec: TraceSpec, shard_size_mb: float) -> list[PlannedShard]:
    """Return consecutive shards of about `shard_size_mb` (10**6 bytes) on disk each, holding whole sequences."""
    limit = max(shard_size_mb * 1e6 / estimated_bytes_per_token(spec), 1)
    shards: list[PlannedShard] = []
    first, tokens = 0, 0
    for stop, own in enumerate([*num_tokens_S, None]):
        if stop > first and (own is None or tokens + own > limit):
            shards.append(PlannedShard(len(shards), first, stop, tokens))
            first, tokens = stop, 0
        tokens += own or 0
    return shards


def estimated_bytes_per_token(spec: TraceSpec) -> float:
    """Return about what a token takes on disk: log2(E) bits an id, two thirds of a float16, 8 bytes for the rest.

    Fitted to the measurements in docs/TRACE_FORMAT.md: 24 bytes for 64 ids of 8 experts, 84 of 128 for their weights.
    """
    floats: float = sum(width for name, width in spec.widths.items() if name != "expert_ids")
    floats += spec.hidden_fraction * spec.num_layers * spec.hidden_size * 1.4  # hidden states shrink less
    return spec.widths["expert_ids"] * max(math.log2(spec.num_experts), 1) / 8 + floats * 2 * 0.66 + 8


def fingerprint(values: dict[str, Any]) -> str:
    """Return a 32-digit blake2b hash of JSON-ready values: equal if and only if everything in them is equal."""
    return hashlib.blake2b(canonical_json(values), digest_size=16).hexdigest()
