"""Other tools' routing records -> a trace folder. Format so far: `requests`, JSONL with one request a line, plain or
gzip.

A line is `{"id", "dataset", "shape": [T, L, K], "tokens": [T strings], "routed_experts": base64 of little-endian int32,
"routing_weights": base64 of little-endian float16}`, weights in all lines or in none. The files are read twice, one
line at a time: first everything is checked and planned, then it is written; so nothing is written from files that do
not hold up, and memory holds one request.
"""

import base64
import binascii
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, progress
from groundwork.provenance import library_versions
from traces.card import write_card
from traces.plan import PLAN_NAME, SEQUENCES_SCHEMA, Plan, cut_shards, fingerprint
from traces.schema import NORMALIZED_TOLERANCE, PHASES, SequenceTrace, TraceSpec, routing_fault
from traces.writer import ShardWriter, file_sha256, lock_run

GZIP_MAGIC = b"\x1f\x8b"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote."""

    run_dir: Path
    sequences: int
    tokens: int
    shards: int
    spec: TraceSpec


@dataclass(frozen=True, eq=False)
class Request:
    """One record as it came: ids in any order, and where it stands."""

    where: str  # "file:line" for messages
    row: int  # line, counted from 0
    dataset: str
    key: str
    tokens_T: list[str]
    ids_TLK: NDArray[np.int32]
    weights_TLK: NDArray[np.float16] | None

    def by_weight(self, id_dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
        """Return ids and weights, by falling weight where there are weights; equal weights keep their order."""
        ids_TLK = self.ids_TLK.astype(id_dtype)
        if self.weights_TLK is None:
            return ids_TLK, None
        order_TLK = np.argsort(-self.weights_TLK.astype(np.float32), axis=-1, kind="stable")
        return np.take_along_axis(ids_TLK, order_TLK, -1), np.take_along_axis(self.weights_TLK, order_TLK, -1)


def import_requests(
    paths: Sequence[Path],
    output_dir: Path,
    num_experts: int,
    model_name: str,
    *,
    model_revision: str | None = None,
    moe_layers: Sequence[int] | None = None,
    phase: str = "prefill",
    quantization: str = UNKNOWN,
    model_dtype: str = UNKNOWN,
    router_dtype: str = UNKNOWN,
    shard_size_mb: float = 256.0,
) -> ImportResult:
    """Write the records of `paths` as a trace folder with plan, manifest and data set card.

    L and K come from the records' shapes; `moe_layers` gives the model's own layer numbers where they are not 0..L-1.
    Experts are stored by falling weight where weights exist, else as given. Raises ConfigurationError, naming file and
    line, on anything that is not a sound record, and for an output folder that holds something already.
    """
    if phase not in PHASES or shard_size_mb <= 0:
        raise ConfigurationError(
            f"phase {phase!r}, shard size {shard_size_mb}: wanted one of {', '.join(PHASES)} and a size above 0"
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(each.name != ".lock" for each in output_dir.iterdir())):
        raise ConfigurationError(f"{output_dir}: holds something already; give an --output_dir that is new or empty")
    template = {
        "model_name": model_name,
        "model_revision": model_revision,
        "num_experts": num_experts,
        "quantization": quantization,
        "model_dtype": model_dtype,
        "router_dtype": router_dtype,
        "attn_implementation": None,
        "experts_implementation": None,
        "library_versions": library_versions(),
        "tokenizer_hash": None,
        "seed": 0,
        "plan_fingerprint": "",
    }
    plan = _plan(list(paths), template, moe_layers, {"phase": phase, "shard_size_mb": shard_size_mb})
    with lock_run(output_dir):
        if (output_dir / PLAN_NAME).exists():  # another import won the race for the folder
            raise ConfigurationError(
                f"{output_dir}: holds something already; give an --output_dir that is new or empty"
            )
        plan.save(output_dir)
        _write(plan, list(paths), output_dir)
        write_card(output_dir)
    tokens = sum(shard.num_tokens for shard in plan.shards)
    return ImportResult(output_dir, plan.sequences.num_rows, tokens, len(plan.shards), plan.spec)


def read_requests(path: Path) -> Iterator[Request]:
    """Stream the requests of one file; raises ConfigurationError with file and line on a line that is none."""
    row = -1
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            lines: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            for row, line in enumerate(lines):
                if line.strip():
                    yield _parse(line, path, row)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigurationError(
            f"{path}: damaged gzip after line {row + 1} ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{path}: can not be read ({error.strerror}); give a JSONL file of requests"
        ) from error


def _parse(line: bytes, path: Path, row: int) -> Request:
    where = f"{path}:{row + 1}"
    try:
        record = json.loads(line)
        shape = tuple(record["shape"])
        if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape is {record['shape']}, wanted [tokens, layers, experts per token], all above 0")
        tokens = record.get("tokens")
        tokens = [""] * shape[0] if tokens is None else tokens
        if len(tokens) != shape[0] or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"{len(tokens)} tokens, wanted {shape[0]} strings as its shape says")
        weights = record.get("routing_weights")
        return Request(
            where=where,
            row=row,
            dataset=_text(record.get("dataset") or path.name.split(".")[0]),
            key=_text(record.get("id", row)),
            tokens_T=[_text(token) for token in tokens],
            ids_TLK=_decode(record["routed_experts"], "<i4", shape, "routed_experts"),
            weights_TLK=None if weights is None else _decode(weights, "<f2", shape, "routing_weights"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigurationError(
            f"{where}: not a request record ({reason}); see docs/TRACE_FORMAT.md for the format 'requests'"
        ) from error


def _plan(
    paths: list[Path], template: dict[str, Any], moe_layers: Sequence[int] | None, settings: dict[str, Any]
) -> Plan:
    """Read everything once: check each record against the first one's shape, count, and lay out the shards."""
    spec: TraceSpec | None = None
    normalized = True
    rows: dict[str, list[Any]] = {name: [] for name in ("dataset", "sequence_key", "source_row", "num_tokens")}
    sources = []
    for path in progress(paths, description="checking", unit="file"):
        before = len(rows["num_tokens"])
        for request in read_requests(path):
            spec = spec or _spec_of(request, template, moe_layers)
            ids_TLK, weights_TLK = _checked(request, spec)
            if weights_TLK is not None:
                off = np.abs(weights_TLK.sum(-1, dtype=np.float32) - 1).max()
                normalized = normalized and bool(off <= NORMALIZED_TOLERANCE)
            for name, value in zip(rows, (request.dataset, request.key, request.row, ids_TLK.shape[0]), strict=True):
                rows[name].append(value)
        own = rows["num_tokens"][before:]
        sources.append({"name": path.name, "sha256": file_sha256(path), "sequences": len(own), "tokens": sum(own)})
    if spec is None:
        raise ConfigurationError(f"{', '.join(map(str, paths)) or 'no file'}: holds no request; give JSONL of requests")
    spec = replace(spec, weights_normalized=normalized if "weights" in spec.store else None)
    settings = {"format": "requests"} | settings
    print_of_all = fingerprint({"settings": settings, "sources": sources, "spec": spec.to_json()})
    spec = replace(spec, plan_fingerprint=print_of_all)
    shards = cut_shards(rows["num_tokens"], spec, settings["shard_size_mb"])
    count = len(rows["num_tokens"])
    shard_of = np.repeat([s.index for s in shards], [s.stop_sequence - s.first_sequence for s in shards])
    columns = {"sequence_id": range(count), **rows, "shard": shard_of, "batch": range(count)}
    table = pa.table(
        {name: pa.array(columns[name], SEQUENCES_SCHEMA.field(name).type) for name in SEQUENCES_SCHEMA.names}
    )
    return Plan(print_of_all, spec, settings, sources, shards, table.cast(SEQUENCES_SCHEMA))


def _spec_of(request: Request, template: dict[str, Any], moe_layers: Sequence[int] | None) -> TraceSpec:
    """Return the spec that the first record's shape implies; whether weights sum to 1 is not known yet."""
    _, layers, top_k = request.ids_TLK.shape
    weighted = request.weights_TLK is not None
    try:
        return TraceSpec(
            num_layers=layers,
            top_k=top_k,
            moe_layers=tuple(range(layers)) if moe_layers is None else tuple(moe_layers),
            expert_order="weight" if weighted else "unknown",
            weights_normalized=None,
            store=("weights",) if weighted else (),
            **template,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"{request.where}: shape {list(request.ids_TLK.shape)} does not fit the options ({error}); "
            "correct --num_experts or --moe_layers"
        ) from error


def _checked(request: Request, spec: TraceSpec) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
    """Return ids and weights as they will be stored; raises ConfigurationError unless they fit the run."""
    _, layers, top_k = request.ids_TLK.shape
    if (layers, top_k) != (spec.num_layers, spec.top_k):
        raise ConfigurationError(
            f"{request.where}: {layers} layers and {top_k} experts per token, the first record has "
            f"{spec.num_layers} and {spec.top_k}; import the runs of different models into folders of their own"
        )
    if (request.weights_TLK is not None) != ("weights" in spec.store):
        raise ConfigurationError(
            f"{request.where}: {'lacks' if request.weights_TLK is None else 'has'} routing_weights, unlike the "
            "first record; import records with and without weights into folders of their own"
        )
    low, high = int(request.ids_TLK.min()), int(request.ids_TLK.max())
    if low < 0 or high >= spec.num_experts:
        raise ConfigurationError(
            f"{request.where}: expert id {low if low < 0 else high} is not in 0..{spec.num_experts - 1}; "
            "correct --num_experts or the record"
        )
    ids_TLK, weights_TLK = request.by_weight(spec.id_dtype)
    fault = routing_fault(spec, ids_TLK, weights_TLK)
    if fault:
        raise ConfigurationError(f"{request.where}: {fault}; correct or remove the record")
    return ids_TLK, weights_TLK


def _write(plan: Plan, paths: list[Path], output_dir: Path) -> None:
    """Read everything a second time and write the planned shards."""
    requests = (request for path in paths for request in read_requests(path))
    phase = PHASES[plan.settings["phase"]]
    total = sum(shard.num_tokens for shard in plan.shards)
    bar: Progress[None] = progress(total=total, description="importing", unit="tok")
    with bar:
        for shard in plan.shards:
            with ShardWriter(output_dir, plan.spec, shard) as writer:
                for sequence_id in range(shard.first_sequence, shard.stop_sequence):
                    request = next(requests)
                    ids_TLK, weights_TLK = _checked(request, plan.spec)
                    tokens = ids_TLK.shape[0]
                    writer.write(
                        SequenceTrace(
                            dataset=request.dataset,
                            sequence_id=sequence_id,
                            sequence_key=request.key,
                            token_ids_T=np.full(tokens, -1, np.int32),
                            tokens_T=request.tokens_T,
                            phase_T=np.full(tokens, phase, np.uint8),
                            expert_ids_TLK=ids_TLK,
                            routing_weights_TLK=weights_TLK,
                        )
                    )
                    bar.update(tokens)
                writer.commit()


def _decode(text: str, dtype: str, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    """Return the array a base64 field holds; raises ValueError unless it has exactly the shape's size."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is no base64: {error}") from error
    wanted = int(np.prod([int(n) for n in shape], dtype=object)) * np.dtype(dtype).itemsize
    if len(data) != wanted:
        raise ValueError(f"{name} holds {len(data)} bytes, wanted {wanted} for shape {list(shape)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _text(value: object) -> str:
    """Return a value as a string that UTF-8 can hold: a lone surrogate, which JSON can spell, becomes '?'."""
    return str(value).encode("utf-8", "replace").decode()
