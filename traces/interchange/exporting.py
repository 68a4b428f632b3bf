"""A trace folder -> other tools' routing records, streamed: one sequence in memory.

Files are written into a hidden folder beside the wanted one, fsynced, and appear under their name all at once by a
rename; a killed export leaves nothing that looks like one. What a format has no field for goes into extra fields that
our import reads back; columns that no format carries are named in the result.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groundwork.atomic import fsync_folder
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.progress import Progress, progress
from traces.interchange import flame, records, requests, sglang, vllm
from traces.reader import TraceDataset
from traces.schema import SequenceTrace, TraceSpec

WRITERS: dict[str, Callable[[Iterable[SequenceTrace], TraceSpec, Path], None]] = {
    "requests": requests.write,
    "sglang": sglang.write,
    "vllm": vllm.write,
    "flame": flame.write,
    "records": records.write,
}
NOT_CARRIED = {"logits": "router_logits", "lookahead": "lookahead_logits"}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote; `left_out` are the columns of the traces that no format carries."""

    output_dir: Path
    format: str
    sequences: int
    tokens: int
    files: list[str]  # relative to output_dir
    left_out: list[str]
    spec: TraceSpec

    def facts(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self) | {"output_dir": str(self.output_dir), "spec": self.spec.to_json()}


def export_traces(shard_dir: Path, output_dir: Path, record_format: str, *, split: str = "all") -> ExportResult:
    """Write the traces of `split` as records of another tool's format into a new or empty folder.

    Raises ConfigurationError for an unknown format or split, a folder in use, and a split without sequences.
    """
    if record_format not in WRITERS:
        raise ConfigurationError(f"--format {record_format}: unknown; choose one of {', '.join(WRITERS)}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigurationError(f"{output_dir}: is not empty; choose another --output_dir")
    dataset = TraceDataset(shard_dir)
    counts = {"sequences": 0, "tokens": 0}
    sequences = _counted(dataset.sequences(split, columns=("weights", "tokens")), counts, dataset.num_tokens)
    with _new_folder(output_dir) as folder:
        WRITERS[record_format](sequences, dataset.spec, folder)
        if counts["sequences"] == 0:
            raise ConfigurationError(f"{shard_dir}: split {split} holds no sequences; choose another --split")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    left_out = [column for name, column in NOT_CARRIED.items() if name in dataset.spec.store]
    return ExportResult(output_dir, record_format, **counts, files=files, left_out=left_out, spec=dataset.spec)


def _counted(sequences: Iterator[SequenceTrace], counts: dict[str, int], total: int) -> Iterator[SequenceTrace]:
    bar: Progress[None] = progress(total=total, description="exporting", unit="token")
    with bar:
        for sequence in sequences:
            yield sequence
            counts["sequences"] += 1
            counts["tokens"] += sequence.num_tokens
            bar.update(sequence.num_tokens)


@contextlib.contextmanager
def _new_folder(output_dir: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `output_dir` when all went well, and vanishes when not."""
    parent = output_dir.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{output_dir.name}.", suffix=".tmp") as hidden:
            folder = Path(hidden) / output_dir.name  # within, for the outer folder is readable by its owner only
            folder.mkdir()
            yield folder
            for path in (*folder.rglob("*"), folder):
                _fsync(path)
            os.replace(folder, output_dir)  # noqa: PTH105 - an empty folder of that name is replaced
        fsync_folder(parent)
    except OSError as error:
        raise ExpertSpeculationError(
            f"{output_dir}: can not be written ({error.strerror or error}); free disk space or choose another folder"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
