"""What a run will do, decided before any model work: `plan.json` (spec, settings, sources, shard ranges) and
`plan.parquet` (one row per sequence).

plan.json is written last and holds the checksum of plan.parquet and a digest of itself, and is compared as bytes when
loaded: a run either has a whole, unchanged plan or none.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from groundwork.atomic import write_bytes
from groundwork.errors import ConfigurationError
from traces.manifest import canonical_json
from traces.schema import TraceSpec

PLAN_NAME = "plan.json"
SEQUENCES_NAME = "plan.parquet"

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
        if self.sequences["sequence_id"].to_pylist() != list(range(self.sequences.num_rows)):
            raise ValueError("sequence ids do not count from 0")
        tokens, shard_of = self.sequences["num_tokens"].to_numpy(), self.sequences["shard"].to_numpy()
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
        """Write plan.parquet, then plan.json, each atomically."""
        run_dir.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pq.write_table(self.sequences, buffer, compression="zstd", write_page_checksum=True)
        write_bytes(run_dir / SEQUENCES_NAME, buffer.getvalue())
        write_bytes(run_dir / PLAN_NAME, self._render(hashlib.sha256(buffer.getvalue()).hexdigest()))

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Read a run's plan; raises ConfigurationError where it is missing or not what was saved."""
        path, table_path = run_dir / PLAN_NAME, run_dir / SEQUENCES_NAME
        values = _read_values(path)
        if not table_path.is_file():
            raise _missing(table_path)
        try:
            table = table_path.read_bytes()
            if hashlib.sha256(table).hexdigest() != values["sequences_sha256"]:
                raise ConfigurationError(
                    f"{table_path}: sha256 differs from the one in {PLAN_NAME}; restore the file or collect again"
                )
            return cls(
                fingerprint=values["fingerprint"],
                spec=TraceSpec.from_json(values["spec"]),
                settings=values["settings"],
                sources=values["sources"],
                shards=_shards(values),
                sequences=pq.read_table(io.BytesIO(table)).replace_schema_metadata(None),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error

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
    try:
        return _shards(values)
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _read_values(path: Path) -> dict[str, Any]:
    """Return what plan.json holds; raises ConfigurationError where it is missing or differs from its own digest."""
    if not path.is_file():
        raise _missing(path)
    try:
        text = path.read_bytes()
        values: dict[str, Any] = json.loads(text)
        if _with_digest({name: value for name, value in values.items() if name != "digest"}) != text:
            raise ValueError("the content differs from its own digest")
        return values
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _shards(values: dict[str, Any]) -> list[PlannedShard]:
    return [PlannedShard(**shard) for shard in values["shards"]]


def _missing(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path}: missing; the folder holds no complete run, collect into it first")


def _damaged(path: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"{path}: not a plan as it was saved ({error}); restore the file or collect again")


def _with_digest(values: dict[str, Any]) -> bytes:
    """Return plan.json's bytes, which hold a digest of everything else in them."""
    values = values | {"digest": fingerprint(values)}
    return json.dumps(values, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"


def shard_name(index: int) -> str:
    """Return the file name of shard `index`; zero-padded, so that names sort as indices up to 99,999."""
    return f"train-{index:05d}.parquet"


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
    floats = sum(width for name, width in spec.widths.items() if name != "expert_ids")
    return spec.widths["expert_ids"] * max(math.log2(spec.num_experts), 1) / 8 + floats * 2 * 0.66 + 8


def fingerprint(values: dict[str, Any]) -> str:
    """Return a 32-digit blake2b hash of JSON-ready values: equal if and only if everything in them is equal."""
    return hashlib.blake2b(canonical_json(values), digest_size=16).hexdigest()
