"""Format `vllm`: the integer arrays [tokens, layers, K] that vLLM returns with `enable_return_routed_experts`, saved by
numpy.

A `.npy` is one sequence. An `.npz` holds one sequence as `routed_experts`, or many as `<name>.routed_experts`, each
with what is known of it under the same name: `prompt_routed_experts`, `prompt_token_ids`, `token_ids` (all sampled ids,
as vLLM gives them), and from export `input_token_ids` (one id per row), `routing_weights` [tokens, layers, K] and
`about` (JSON: data set, id, strings, phases, MoE layers). An array of any other name is a sequence by itself.

Read in vllm-project/vllm: docs/training/routed_experts_replay.md (v0.21: `prompt_routed_experts` [prompt, MoE layers,
K] beside `routed_experts` of the sampled tokens, int16, -1 where the prefix cache skipped a token),
examples/rl/routed_experts_e2e.py (2026: one array, rows = prompt + sampled - 1, for the last sampled token is never
run) and the tests of /v1/completions (num_hidden_layers layers; over HTTP, base64 of a `.npy` file).
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from traces.interchange.files import default_dataset
from traces.interchange.record import Dropped, Record, Source, Unusable
from traces.interchange.sglang import spread
from traces.interchange.values import as_layers, as_phases, as_strings, as_text, as_token_ids, parse_json, phase_value
from traces.schema import SequenceTrace, TraceSpec

PARTS = (
    "routed_experts",
    "prompt_routed_experts",
    "prompt_token_ids",
    "token_ids",
    "input_token_ids",
    "routing_weights",
    "about",
)
SEQUENCES_PER_FILE = 1000
UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError)


class VllmSource(Source):
    """The sequences of `.npy` and `.npz` files; memory: one sequence. Nothing pickled is read."""

    def __iter__(self) -> Iterator[Record | Dropped]:
        for file, path in enumerate(self.files):
            try:
                # Mapped, so that a header that promises more than the file holds is refused before memory is spent.
                loaded = np.load(path, allow_pickle=False, mmap_mode="r")
            except UNREADABLE as error:
                raise ConfigurationError(f"{path}: no .npy or .npz file ({error}); save arrays with numpy") from error
            if isinstance(loaded, np.ndarray):
                yield self._checked({"routed_experts": path.stem}, {path.stem: loaded}, file, 0, path.stem)
                continue
            with loaded:
                for row, (name, members) in enumerate(_sequences_in(loaded.files).items()):
                    yield self._checked(members, loaded, file, row, name)

    def _checked(
        self, members: dict[str, str], arrays: Mapping[str, Any], file: int, row: int, name: str
    ) -> Record | Dropped:
        path = self.files[file]
        where = f"{path}[{name}]" if path.suffix == ".npz" and name else str(path)
        try:
            parts = {part: _read(arrays, member) for part, member in members.items()}
            return self._record(parts, file, where, row, name or path.stem)
        except Unusable as error:
            return Dropped(file, where, error.reason, error.detail)

    def _record(self, parts: dict[str, NDArray[Any]], file: int, where: str, row: int, name: str) -> Record:
        about = parse_json(parts["about"].tobytes()) if "about" in parts else {}
        if not isinstance(about, dict):
            raise Unusable("not a record", "about is no JSON object")
        prompt_TLK, whole_TLK = (parts.get(part) for part in ("prompt_routed_experts", "routed_experts"))
        arrays = [array for array in (prompt_TLK, whole_TLK) if array is not None]
        for array in arrays:
            if array.ndim != 3 or array.dtype.kind not in "iu":
                found = f"{array.dtype} {list(array.shape)}"
                raise Unusable("not a record", f"{found}, wanted an array of integers [tokens, layers, K]")
        if not arrays:
            raise Unusable("no routing", "neither routed_experts nor prompt_routed_experts")
        if arrays[0].shape[1:] != arrays[-1].shape[1:]:
            raise Unusable("array size does not fit", f"{[list(array.shape) for array in arrays]} can not be joined")
        ids_TLK = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        asked, token_ids_T = _tokens_of(parts, len(ids_TLK))
        if prompt_TLK is not None:
            if asked not in (None, len(prompt_TLK)):
                raise Unusable("rows do not match tokens", f"{len(prompt_TLK)} prompt rows for {asked} prompt ids")
            asked = len(prompt_TLK)
        phase_T = None if asked is None else (np.arange(len(ids_TLK)) >= asked).astype(np.uint8)
        return Record(
            file=file,
            where=where,
            row=row,
            dataset=as_text(about.get("dataset") or self.settings.dataset or default_dataset(self.files[file])),
            key=as_text(about.get("id", name)),
            ids_TLK=ids_TLK,
            weights_TLK=parts.get("routing_weights"),
            moe_layers=as_layers(about.get("moe_layers")),
            token_ids_T=token_ids_T,
            tokens_T=as_strings(about.get("tokens")),
            phase_T=as_phases(about["phase"], len(ids_TLK)) if "phase" in about else phase_T,
        )


def write(sequences: Iterable[SequenceTrace], spec: TraceSpec, folder: Path) -> None:
    """Write `traces-00000.npz` and so on, up to 1,000 sequences each, dense layers as zeros."""
    remaining = iter(sequences)
    for number, first in enumerate(remaining):
        with zipfile.ZipFile(folder / f"traces-{number:05d}.npz", "w") as archive:
            for sequence in chain([first], islice(remaining, SEQUENCES_PER_FILE - 1)):
                _write_sequence(archive, sequence, spec)


def _write_sequence(archive: zipfile.ZipFile, sequence: SequenceTrace, spec: TraceSpec) -> None:
    about: dict[str, Any] = {
        "dataset": sequence.dataset,
        "id": sequence.sequence_key,
        "moe_layers": list(spec.moe_layers),
        "phase": phase_value(sequence.phase_T),
    }
    if any(sequence.tokens_T):
        about["tokens"] = sequence.tokens_T
    arrays = {"routed_experts": spread(sequence.expert_ids_TLK, spec)}
    if sequence.routing_weights_TLK is not None:
        arrays["routing_weights"] = spread(sequence.routing_weights_TLK, spec)
    if (sequence.token_ids_T != -1).any():
        arrays["input_token_ids"] = sequence.token_ids_T
    arrays["about"] = np.frombuffer(json.dumps(about, ensure_ascii=False).encode(), np.uint8)
    for part, array in arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
        member = zipfile.ZipInfo(f"{sequence.sequence_id:06d}.{part}.npy")  # dated 1980: equal traces, equal bytes
        member.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(member, buffer.getvalue(), compresslevel=4)


def _sequences_in(names: list[str]) -> dict[str, dict[str, str]]:
    """Return sequence name -> part -> array name, in the archive's order."""
    sequences: dict[str, dict[str, str]] = {}
    for name in names:
        prefix, _, part = name.rpartition(".")
        if part not in PARTS:
            prefix, part = name, "routed_experts"
        sequences.setdefault(prefix, {})[part] = name
    return sequences


def _read(arrays: Mapping[str, Any], member: str) -> NDArray[Any]:
    try:
        array = arrays[member]
    except UNREADABLE as error:
        raise Unusable("not a record", f"array {member!r} can not be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise Unusable("not a record", f"{member!r} is no array")
    return array


def _tokens_of(parts: dict[str, NDArray[Any]], rows: int) -> tuple[int | None, NDArray[np.int32] | None]:
    """Return how many rows are prompt, where that is known, and each row's token id."""
    names = ("prompt_token_ids", "token_ids", "input_token_ids")
    given = {name: _ids(parts[name], name) for name in names if name in parts}
    if "input_token_ids" in given:
        return None, as_token_ids(given["input_token_ids"])
    if "token_ids" not in given and "prompt_token_ids" not in given:
        return None, None
    asked, sampled = given.get("prompt_token_ids"), given.get("token_ids", [])
    if asked is None:
        raise Unusable("rows can not be counted", "token_ids without prompt_token_ids")
    wanted = len(asked) + max(len(sampled) - 1, 0)
    if rows != wanted:
        raise Unusable(
            "rows do not match tokens", f"{rows} rows, wanted {len(asked)} prompt ids + {len(sampled)} sampled ids - 1"
        )
    return len(asked), as_token_ids((asked + sampled)[:rows])


def _ids(array: NDArray[Any], name: str) -> list[int]:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise Unusable("not a record", f"{name} is {array.dtype} {list(array.shape)}, wanted integers [tokens]")
    ids: list[int] = array.tolist()
    return ids
