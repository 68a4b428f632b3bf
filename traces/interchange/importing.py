"""Other tools' routing records -> a trace folder, in two passes over the source with one sequence in memory.

The first pass checks every record, and plans what is provably complete; the second writes it, shard by shard, skipping
what a killed import has finished. So nothing is written of what does not hold up, and nothing of a source of which
nothing holds up. The plan's fingerprint covers the files' contents, the settings and the rows kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.progress import Progress, progress
from traces.card import write_card
from traces.interchange.flame import FlameSource
from traces.interchange.planning import Row, make_plan, one_run
from traces.interchange.record import Account, Dropped, Record, Source, Unusable, usable
from traces.interchange.records import RecordsSource
from traces.interchange.requests import RequestsSource
from traces.interchange.settings import ImportSettings
from traces.interchange.sglang import SglangSource
from traces.interchange.vllm import VllmSource
from traces.plan import Plan
from traces.run_folder import begin, check_folder, check_free_space, writing
from traces.schema import NORMALIZED_TOLERANCE, PHASES, SequenceTrace, TraceSpec
from traces.writer import ShardWriter

SOURCES: dict[str, Callable[[list[Path], ImportSettings], Source]] = {
    "requests": RequestsSource,
    "sglang": SglangSource,
    "vllm": VllmSource,
    "flame": FlameSource,
    "records": RecordsSource,
}


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote and left out; `spec` is None where nothing could be used and nothing was written."""

    run_dir: Path
    sequences: int
    tokens: int
    shards: int
    spec: TraceSpec | None
    dropped: Account

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        spec = None if self.spec is None else self.spec.to_json()
        counts = {"sequences": self.sequences, "tokens": self.tokens, "shards": self.shards}
        return {"run_dir": str(self.run_dir), **counts, "dropped": self.dropped.facts(), "spec": spec}


def import_traces(paths: Sequence[Path], settings: ImportSettings) -> ImportResult:
    """Write what is provably complete in `paths` as a trace folder with plan, manifest and data set card.

    What is left out is in the result's `dropped`, by reason, and is the caller's to report. Raises ConfigurationError,
    with nothing written, for files that can not be read as the format at all, for records that can not belong to one
    run and settings that do not tell which, and for an output folder in use.
    """
    if settings.format not in SOURCES:
        raise ConfigurationError(f"--format {settings.format}: unknown; choose one of {', '.join(SOURCES)}")
    check_folder(settings.output_dir, resume=settings.resume)
    for path in paths:  # a pipe could not be read twice
        if not (path.is_dir() if settings.format == "flame" else path.is_file()):
            wanted = "folder of layer files" if settings.format == "flame" else "plain file"
            raise ConfigurationError(f"{path}: no such {wanted}; --format {settings.format} reads nothing else")
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise ConfigurationError(f"{path}: is named {count} times; name it once")
    with closing(SOURCES[settings.format](list(paths), settings)) as source:
        return _import(source, settings)


def _import(source: Source, settings: ImportSettings) -> ImportResult:
    dropped = Account()
    rows = _survey(source, settings, dropped)
    kept = one_run(rows, settings, dropped)
    if not any(kept):
        return ImportResult(settings.output_dir, 0, 0, 0, None, dropped)
    plan = make_plan([row for row in kept if row is not None], source, settings, dropped)
    check_free_space(settings.output_dir, plan)
    with writing(settings.output_dir):
        plan, finished = begin(settings.output_dir, plan, resume=settings.resume)
        _write(plan, finished, _chosen_records(source, kept), settings)
        write_card(settings.output_dir)
    tokens = sum(shard.num_tokens for shard in plan.shards)
    return ImportResult(settings.output_dir, plan.sequences.num_rows, tokens, len(plan.shards), plan.spec, dropped)


def _survey(source: Source, settings: ImportSettings, dropped: Account) -> list[Row | None]:
    """Check every record; returns what the plan needs of each, None where it is unusable by itself."""
    rows: list[Row | None] = []
    bar: Progress[Record | Dropped] = progress(source, description="checking", unit="sequence")
    for each in bar:
        if isinstance(each, Dropped):
            dropped.add(each)
            continue
        try:
            record = usable(each, settings)
        except Unusable as error:
            dropped.add(Dropped(each.file, each.where, error.reason, error.detail))
            rows.append(None)
            continue
        tokens, _, top_k = record.ids_TLK.shape
        weights = record.weights_TLK
        off = 0.0 if weights is None else float(np.abs(weights.sum(-1, dtype=np.float32) - 1).max())
        rows.append(
            Row(
                where=each.where,
                file=each.file,
                source_row=each.row,
                dataset=record.dataset,
                sequence_key=record.key,
                num_tokens=tokens,
                layout=(record.moe_layers or (), top_k),
                weighted=weights is not None,
                normalized=off <= NORMALIZED_TOLERANCE,
            )
        )
    return rows


def _chosen_records(source: Source, kept: list[Row | None]) -> Iterator[Record]:
    """Read the source a second time, only what is kept."""
    records = (each for each in source if isinstance(each, Record))
    for record, row in zip(records, kept, strict=False):  # a source that has become shorter is noticed by the writer
        if row is not None:
            yield record


def _write(plan: Plan, finished: set[int], records: Iterator[Record], settings: ImportSettings) -> None:
    """Write the planned shards that are not finished; raises ExpertSpeculationError where the source has changed."""
    total = sum(shard.num_tokens for shard in plan.shards if shard.index not in finished)
    bar: Progress[None] = progress(total=total, description="importing", unit="token")
    with bar:
        for shard in plan.shards:
            sequence_ids = range(shard.first_sequence, shard.stop_sequence)
            if shard.index in finished:
                for _ in sequence_ids:
                    next(records, None)
                continue
            planned = plan.sequences.slice(shard.first_sequence, len(sequence_ids)).to_pylist()
            with ShardWriter(settings.output_dir, plan.spec, shard) as writer:
                for sequence_id, row in zip(sequence_ids, planned, strict=True):
                    record = next(records, None)
                    found = None if record is None else (record.dataset, record.key, record.ids_TLK.shape[0])
                    if record is None or found != (row["dataset"], row["sequence_key"], row["num_tokens"]):
                        raise ExpertSpeculationError(
                            f"{settings.output_dir}: the source changed while it was read; import it again"
                        )
                    sequence = _as_stored(record, sequence_id, plan.spec, settings)
                    writer.write(sequence)
                    bar.update(sequence.num_tokens)
                writer.commit()


def _as_stored(record: Record, sequence_id: int, spec: TraceSpec, settings: ImportSettings) -> SequenceTrace:
    try:
        record = usable(record, settings)
    except Unusable as error:
        raise ExpertSpeculationError(f"{record.where}: changed while it was read ({error}); import it again") from error
    tokens = record.ids_TLK.shape[0]
    unknown_ids, unknown_phase = np.full(tokens, -1, np.int32), np.full(tokens, PHASES[settings.phase], np.uint8)
    return SequenceTrace(
        dataset=record.dataset,
        sequence_id=sequence_id,
        sequence_key=record.key,
        token_ids_T=unknown_ids if record.token_ids_T is None else record.token_ids_T,
        tokens_T=[""] * tokens if record.tokens_T is None else record.tokens_T,
        phase_T=unknown_phase if record.phase_T is None else record.phase_T,
        expert_ids_TLK=record.ids_TLK.astype(spec.id_dtype),
        routing_weights_TLK=record.weights_TLK,
    )
