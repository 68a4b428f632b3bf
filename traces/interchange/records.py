"""Format `records`: JSON lines of one record per token and layer, as profilers hooked into a model write them.

    {"dataset": "gsm8k", "problem_id": 0, "layer": 3, "token_idx": 17, "experts": [6, 1], "gating_probs": [0.7, 0.3]}

These are the names of github.com/Mario928/speculative-moe; `--field NAME=KEY` reads a NAME from another KEY, an empty
KEY for `sequence` makes each file one sequence. Data set and `problem_id` together tell sequences apart.

That source also shows the traps: it leaves out single records (those weighted exactly 0.5, 0.5) and then numbers what
is left of each layer, so that one missing record slips all that follow it. A sequence is therefore kept only where each
of its tokens 0..T-1 has each of its layers exactly once.

Records may come in any order, also mixed with other sequences' as a batching server writes them: they are sorted
through a temporary SQLite file in Python's temporary folder (TMPDIR). Memory: one sequence.
"""

import sqlite3
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from groundwork.errors import ExpertSpeculationError
from traces.interchange.files import JsonLinesWriter, default_dataset, read_lines
from traces.interchange.record import Dropped, Record, Source, Unusable
from traces.interchange.settings import FIELDS, ImportSettings
from traces.interchange.values import as_text, parse_json
from traces.schema import PHASES, SequenceTrace, TraceSpec

ROWS_AT_ONCE = 20_000
MOST = 2**31 - 1
ROW_FIELDS = {
    "token": "a number from 0",
    "layer": "a number from 0",
    "experts": "a list of integers",
    "weights": "a list of numbers",
    "token_id": "an integer, -1 where unknown",
    "text": "a string",
    "phase": "prefill or decode",
}
Row = tuple[int, int, int, int, int, bytes, bytes | None, int | None, str | None, int | None]


class RecordsSource(Source):
    """The sequences of files of records, in the order in which they first appear."""

    def __init__(self, paths: list[Path], settings: ImportSettings) -> None:
        super().__init__(paths, settings)
        self._names = FIELDS | dict(settings.fields)
        self._row_keys = [self._names[name] for name in ROW_FIELDS]
        self._folder = tempfile.TemporaryDirectory(prefix="expert-speculation-")
        self._sorted: sqlite3.Connection | None = None
        self._keys: list[tuple[str, str]] = []  # data set and key of each sequence
        self._faults: dict[int, Dropped] = {}  # first fault of each sequence that has one

    def __iter__(self) -> Iterator[Record | Dropped]:
        if self._sorted is None:
            try:
                self._sorted = self._sort()
            except sqlite3.Error as error:
                raise ExpertSpeculationError(
                    f"{self._folder.name}: the records can not be sorted there ({error}); free space, or set TMPDIR "
                    "to a folder with more"
                ) from error
        for stray in self._sorted.execute("SELECT * FROM strays"):
            yield Dropped(*stray)
        for number in range(len(self._keys)):
            yield self._faults.get(number) or self._sequence(number)

    def close(self) -> None:
        if self._sorted is not None:
            self._sorted.close()
        self._folder.cleanup()

    def _sort(self) -> sqlite3.Connection:
        """Read all files into a table of records and index it by sequence, token and layer."""
        table = sqlite3.connect(Path(self._folder.name) / "records.sqlite")
        table.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE;")
        table.execute(
            "CREATE TABLE records (sequence INTEGER, token INTEGER, layer INTEGER, file INTEGER, line INTEGER, "
            "experts BLOB, weights BLOB, token_id INTEGER, text TEXT, phase INTEGER)"
        )
        # Lines of which not even the sequence is known.
        table.execute("CREATE TABLE strays (file INTEGER, place TEXT, reason TEXT, detail TEXT)")
        numbers: dict[tuple[str, str], int] = {}
        pending: list[Row] = []
        for file, path in enumerate(self.files):
            for line, data in read_lines(path):
                where, number = f"{path}:{line}", None
                try:
                    values = parse_json(data)
                    dataset, own = self._identity_of(values, file)
                    number = numbers.setdefault((dataset, own), len(numbers))
                    named = values.get(self._names["key"])
                    key = own if named is None else as_text(named)
                    if number == len(self._keys):
                        self._keys.append((dataset, key))
                    if key != self._keys[number][1]:
                        raise Unusable("a sequence's records disagree", f"{self._names['key']!r} is {key[:60]}")
                    pending.append(self._row(values, number, file, line))
                except Unusable as error:
                    dropped = Dropped(file, where, error.reason, error.detail)
                    if number is None:
                        table.execute("INSERT INTO strays VALUES (?, ?, ?, ?)", astuple(dropped))
                    else:
                        self._faults.setdefault(number, dropped)
                if len(pending) >= ROWS_AT_ONCE:
                    table.executemany(f"INSERT INTO records VALUES ({','.join('?' * 10)})", pending)
                    pending.clear()
        table.executemany(f"INSERT INTO records VALUES ({','.join('?' * 10)})", pending)
        table.execute("CREATE INDEX by_sequence ON records (sequence, token, layer)")
        return table

    def _identity_of(self, values: Any, file: int) -> tuple[str, str]:
        """Return data set and id of a record's sequence, which tell it from others."""
        if not isinstance(values, dict):
            raise Unusable("not a record", f"{type(values).__name__}, wanted an object")
        path, name = self.files[file], self._names["sequence"]
        own: Any = values.get(name) if name else default_dataset(path)
        if isinstance(own, bool) or not isinstance(own, int | str):
            raise Unusable("not a record", f"{name!r} is {str(own)[:60]}, wanted the sequence's id; see --field")
        dataset = values.get(self._names["dataset"]) or self.settings.dataset or default_dataset(path)
        return as_text(dataset), as_text(own)

    def _row(self, values: dict[str, Any], sequence: int, file: int, line: int) -> Row:
        """Return a record as a row of the table; raises Unusable unless every value is of its type."""
        given: list[Any] = [values.get(key) for key in self._row_keys]
        token, layer, experts, weights, token_id, text, phase = given
        name = _malformed(*given)
        if name is not None:
            key = self._names[name]
            raise Unusable("not a record", f"{key!r} is {str(values.get(key))[:60]}, wanted {ROW_FIELDS[name]}")
        if weights is not None and len(weights) != len(experts):
            detail = f"{len(weights)} weights for {len(experts)} experts, wanted one each"
            raise Unusable("weights do not fit the experts", detail)
        return (
            sequence,
            token,
            layer,
            file,
            line,
            struct.pack(f"<{len(experts)}i", *experts),
            None if weights is None else struct.pack(f"<{len(weights)}d", *weights),
            token_id,
            None if text is None else as_text(text),
            PHASES.get(phase, phase),
        )

    def _sequence(self, number: int) -> Record | Dropped:
        assert self._sorted is not None
        query = "SELECT * FROM records WHERE sequence = ? ORDER BY token, layer"
        rows: list[Row] = self._sorted.execute(query, (number,)).fetchall()
        file, line = min((row[3], row[4]) for row in rows)
        where = f"{self.files[file]}:{line}"
        dataset, key = self._keys[number]
        try:
            layers = _complete_layers(rows)
            ids_TLK = _stacked([row[5] for row in rows], "<i4", len(layers), "experts per token vary")
            packed = [row[6] for row in rows]
            weights_TLK = None
            if any(each is not None for each in packed):
                if any(each is None for each in packed):
                    raise Unusable("weights missing", "some of its records have weights, some have none")
                weights_TLK = _stacked(packed, "<f8", len(layers), "weights do not fit the experts")
            token_ids, texts, phases = (_per_token(rows, column, len(layers)) for column in (7, 8, 9))
        except Unusable as error:
            return Dropped(file, f"{where} (sequence {key} of {dataset})", error.reason, error.detail)
        return Record(
            file=file,
            where=where,
            row=line - 1,
            dataset=dataset,
            key=key,
            ids_TLK=ids_TLK,
            weights_TLK=weights_TLK,
            moe_layers=layers,
            token_ids_T=np.array([-1 if each is None else each for each in token_ids], np.int32),
            tokens_T=["" if each is None else each for each in texts],
            phase_T=np.array([PHASES[self.settings.phase] if each is None else each for each in phases], np.uint8),
        )


def write(sequences: Iterable[SequenceTrace], spec: TraceSpec, folder: Path) -> None:
    """Write `records.jsonl.gz`, a sequence's records together, token after token."""
    names = list(PHASES)
    with JsonLinesWriter(folder / "records.jsonl.gz") as file:
        for sequence in sequences:
            ids = sequence.expert_ids_TLK.tolist()
            weights = None if sequence.routing_weights_TLK is None else sequence.routing_weights_TLK.tolist()
            for token, (token_id, text) in enumerate(
                zip(sequence.token_ids_T.tolist(), sequence.tokens_T, strict=True)
            ):
                known = ({"token_id": token_id} if token_id != -1 else {}) | ({"token": text} if text else {})
                for position, layer in enumerate(spec.moe_layers):
                    values = {
                        "dataset": sequence.dataset,
                        "problem_id": sequence.sequence_id,
                        "sequence_key": sequence.sequence_key,
                        "phase": names[sequence.phase_T[token]],
                        "token_idx": token,
                        "layer": layer,
                        **known,
                        "experts": ids[token][position],
                    }
                    if weights is not None:
                        values["gating_probs"] = weights[token][position]
                    file.write(values)


def _complete_layers(rows: list[Row]) -> tuple[int, ...]:
    """Return a sequence's layers; raises Unusable unless tokens 0..T-1 have each of them exactly once."""
    tokens = np.array([row[1] for row in rows])
    layers = np.array([row[2] for row in rows])
    again = (np.diff(tokens) == 0) & (np.diff(layers) == 0)
    if again.any():
        first = int(again.argmax())
        raise Unusable(
            "a token and layer recorded twice",
            f"token {tokens[first]}, layer {layers[first]}, also in line {rows[first + 1][4]}",
        )
    present, distinct = np.unique(tokens), np.unique(layers)
    if present[-1] != len(present) - 1:
        missing = int((present != np.arange(len(present))).argmax())
        raise Unusable("a token is missing", f"token {missing} of {present[-1] + 1} has no record")
    if len(rows) != len(present) * len(distinct):
        counts = np.bincount(tokens)
        token = int((counts != len(distinct)).argmax())
        lacking = np.setdiff1d(distinct, layers[tokens == token])[0]
        raise Unusable("a token lacks a layer", f"token {token} has no record of layer {lacking}")
    return tuple(int(layer) for layer in distinct)


def _stacked(packed: list[Any], dtype: str, layers: int, reason: str) -> Any:
    """Return packed lists of one length as [T, L, K]."""
    if len({len(each) for each in packed}) > 1:
        raise Unusable(reason, "its records hold lists of different lengths")
    return np.frombuffer(b"".join(packed), dtype).reshape(len(packed) // layers, layers, -1)


def _per_token(rows: list[Row], column: int, layers: int) -> list[Any]:
    """Return what a token's records say of it, None where they do not; raises Unusable where they disagree."""
    values = []
    for first in range(0, len(rows), layers):
        said = {row[column] for row in rows[first : first + layers] if row[column] is not None}
        if len(said) > 1:
            given = ", ".join(sorted(map(repr, said)))
            raise Unusable("a token's records disagree", f"token {rows[first][1]}: {given}")
        values.append(said.pop() if said else None)
    return values


def _malformed(
    token: object, layer: object, experts: object, weights: object, token_id: object, text: object, phase: object
) -> str | None:
    """Return the name of the first value that is not of its type, if any; a weight that is not finite is a number."""
    if type(token) is not int or not 0 <= token <= MOST:
        return "token"
    if type(layer) is not int or not 0 <= layer < 2**16:
        return "layer"
    if (
        type(experts) is not list
        or not {int}.issuperset(map(type, experts))
        or max(map(abs, experts), default=0) >= 2**31
    ):
        return "experts"
    if weights is not None and (type(weights) is not list or not {int, float}.issuperset(map(type, weights))):
        return "weights"
    if weights and any(type(each) is int and abs(each) > 2**53 for each in weights):  # what no double can hold
        return "weights"
    if token_id is not None and (type(token_id) is not int or not -1 <= token_id <= MOST):
        return "token_id"
    if text is not None and type(text) is not str:
        return "text"
    return None if phase is None or phase in ("prefill", "decode", 0, 1) else "phase"
