"""What an import will write: which of the sound records make one run, and the plan that a resumed import must share."""

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from groundwork.errors import ConfigurationError
from groundwork.provenance import library_versions
from traces.interchange.record import Account, Dropped, Source
from traces.interchange.settings import ImportSettings, layers_text
from traces.plan import SEQUENCES_SCHEMA, Plan, cut_shards, fingerprint
from traces.schema import ROW_GROUP_BYTES, TraceSpec, decoded_bytes_per_token
from traces.writer import file_sha256


class Row(NamedTuple):
    """What the plan needs of one record; `layout` is MoE layers and experts per token."""

    where: str
    file: int
    source_row: int
    dataset: str
    sequence_key: str
    num_tokens: int
    layout: tuple[tuple[int, ...], int]
    weighted: bool
    normalized: bool


def one_run(rows: list[Row | None], settings: ImportSettings, dropped: Account) -> list[Row | None]:
    """Return the rows with None for those that can not be in one run with the others.

    All of a run have the same layers and experts per token; where records disagree on them, none is known to be whole,
    and ConfigurationError is raised. All have weights or none has; where some have, those without are incomplete.
    """
    sound = [row for row in rows if row is not None]
    if not sound:
        return rows
    first = sound[0]
    for row in sound:
        if row.layout != first.layout:
            raise ConfigurationError(
                f"{row.where}: MoE layers {layers_text(row.layout[0])} and {row.layout[1]} experts per token, but "
                f"{first.where}: layers {layers_text(first.layout[0])} and {first.layout[1]}; say with --moe_layers "
                "and --top_k which is right, or import different models into folders of their own"
            )
    weighted = any(row.weighted for row in sound)
    spec = _spec(settings, *first.layout, weighted=weighted, normalized=None)
    longest = ROW_GROUP_BYTES // decoded_bytes_per_token(spec)
    kept: list[Row | None] = []
    for each in rows:
        problem = None
        if each is not None and weighted and not each.weighted:
            problem = "weights missing", "it has no weights, others of this import have"
        elif each is not None and each.num_tokens > longest:
            problem = "longer than a row group", f"{each.num_tokens} tokens, a row group holds {longest}"
        if each is not None and problem is not None:
            dropped.add(Dropped(each.file, each.where, *problem))
        kept.append(None if problem else each)
    return kept


def make_plan(rows: list[Row], source: Source, settings: ImportSettings, dropped: Account) -> Plan:
    """Return the plan of the kept rows; its fingerprint covers the files' contents, the settings and the rows."""
    layers, top_k = rows[0].layout
    normalized = all(row.normalized for row in rows) if rows[0].weighted else None
    spec = _spec(settings, layers, top_k, weighted=rows[0].weighted, normalized=normalized)
    checksums = [file_sha256(path) for path in source.files]
    sources: list[dict[str, Any]] = [
        {"name": path.name, "sha256": checksum, "sequences": 0, "tokens": 0, "dropped": dict(dropped.by_file[file])}
        for file, (path, checksum) in enumerate(zip(source.files, checksums, strict=True))
    ]
    for row in rows:
        sources[row.file]["sequences"] += 1
        sources[row.file]["tokens"] += row.num_tokens
    shards = cut_shards([row.num_tokens for row in rows], spec, settings.shard_size_mb)
    columns: dict[str, Any] = {
        "sequence_id": range(len(rows)),
        "shard": np.repeat([s.index for s in shards], [s.stop_sequence - s.first_sequence for s in shards]),
        "batch": range(len(rows)),
    } | {name: [getattr(row, name) for row in rows] for name in ("dataset", "sequence_key", "source_row", "num_tokens")}
    arrays = [pa.array(columns[field.name], field.type) for field in SEQUENCES_SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=SEQUENCES_SCHEMA)
    identity = _identity(settings, checksums)
    digest = fingerprint({"settings": identity, "spec": _comparable(spec), "rows": table.to_pydict()})
    return Plan(digest, replace(spec, plan_fingerprint=digest), identity, sources, shards, table)


def _identity(settings: ImportSettings, checksums: list[str]) -> dict[str, Any]:
    """Return what a resumed import must share, JSON-ready: all settings but where and how often, and the files."""
    values = asdict(settings)
    for name in ("output_dir", "resume"):
        del values[name]
    layers = None if settings.moe_layers is None else layers_text(settings.moe_layers)
    return values | {
        "fields": dict(settings.fields),
        "moe_layers": layers,
        "sources": fingerprint({"sha256": checksums}),
        "expert-speculation": library_versions().get("expert-speculation"),
    }


def _comparable(spec: TraceSpec) -> dict[str, Any]:
    """Return the spec without the library versions: no version but this program's own changes what is imported."""
    return {name: value for name, value in spec.to_json().items() if name != "library_versions"}


def _spec(
    settings: ImportSettings, layers: tuple[int, ...], top_k: int, *, weighted: bool, normalized: bool | None
) -> TraceSpec:
    try:
        return TraceSpec(
            model_name=settings.model_name,
            model_revision=settings.model_revision,
            num_layers=len(layers),
            num_experts=settings.num_experts,
            top_k=top_k,
            moe_layers=layers,
            expert_order="weight" if weighted else "unknown",
            weights_normalized=normalized,
            quantization=settings.quantization,
            model_dtype=settings.model_dtype,
            router_dtype=settings.router_dtype,
            library_versions=library_versions(),
            store=("weights",) if weighted else (),
        )
    except ValueError as error:
        raise ConfigurationError(f"the records do not fit the options: {error}; correct the options") from error
