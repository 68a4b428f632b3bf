"""Format `requests`: JSON lines, one request a line, arrays as base64 with their shape. Our own; nothing is lost in it.

    {"id", "dataset", "shape": [T, L, K], "tokens": [T strings], "token_ids": [T integers],
     "routed_experts": base64 of little-endian int32 [T, L, K], "routing_weights": base64 of little-endian float16,
     "moe_layers": [L integers], "phase": "prefill", "decode" or [T of 0 and 1]}

Only `shape` and `routed_experts` must be there.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.interchange.files import JsonLinesWriter, default_dataset, read_lines
from traces.interchange.record import Dropped, Record, Source, Unusable
from traces.interchange.values import (
    as_layers,
    as_phases,
    as_strings,
    as_text,
    as_token_ids,
    decode_array,
    encode_array,
    parse_json,
    phase_value,
)
from traces.schema import SequenceTrace, TraceSpec


class RequestsSource(Source):
    """The requests of JSONL files, plain, gzip or zstd; memory: one request."""

    def __iter__(self) -> Iterator[Record | Dropped]:
        for file, path in enumerate(self.files):
            for number, line in read_lines(path):
                where = f"{path}:{number}"
                try:
                    yield self._record(parse_json(line), file, where, number - 1)
                except Unusable as error:
                    yield Dropped(file, where, error.reason, error.detail)

    def _record(self, values: Any, file: int, where: str, row: int) -> Record:
        if not isinstance(values, dict):
            raise Unusable("not a record", f"{type(values).__name__}, wanted an object")
        shape = values.get("shape")
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            raise Unusable("not a record", f"shape is {str(shape)[:60]}, wanted [tokens, layers, experts per token]")
        weights = values.get("routing_weights")
        return Record(
            file=file,
            where=where,
            row=row,
            dataset=as_text(values.get("dataset") or self.settings.dataset or default_dataset(self.files[file])),
            key=as_text(row if values.get("id") is None else values["id"]),
            ids_TLK=_shaped(values.get("routed_experts"), "<i4", shape, "routed_experts"),
            weights_TLK=None if weights is None else _shaped(weights, "<f2", shape, "routing_weights"),
            moe_layers=as_layers(values.get("moe_layers")),
            token_ids_T=as_token_ids(values.get("token_ids")),
            tokens_T=as_strings(values.get("tokens")),
            phase_T=as_phases(values.get("phase"), shape[0]),
        )


def write(sequences: Iterable[SequenceTrace], spec: TraceSpec, folder: Path) -> None:
    """Write `requests.jsonl.gz`."""
    with JsonLinesWriter(folder / "requests.jsonl.gz") as file:
        for sequence in sequences:
            values = {
                "id": sequence.sequence_key,
                "dataset": sequence.dataset,
                "shape": list(sequence.expert_ids_TLK.shape),
                "moe_layers": list(spec.moe_layers),
                "phase": phase_value(sequence.phase_T),
                **known_tokens(sequence),
                "routed_experts": encode_array(sequence.expert_ids_TLK, "<i4"),
            }
            if sequence.routing_weights_TLK is not None:
                values["routing_weights"] = encode_array(sequence.routing_weights_TLK, "<f2")
            file.write(values)


def known_tokens(sequence: SequenceTrace) -> dict[str, list[Any]]:
    """Return `tokens` and `token_ids` as far as any of them is known."""
    known: dict[str, list[Any]] = {}
    if any(sequence.tokens_T):
        known["tokens"] = sequence.tokens_T
    if (sequence.token_ids_T != -1).any():
        known["token_ids"] = sequence.token_ids_T.tolist()
    return known


def _shaped(text: object, dtype: str, shape: list[int], name: str) -> NDArray[Any]:
    array = decode_array(text, dtype, name)
    wanted = int(np.prod(np.array(shape, object)))
    if array.size != wanted:
        raise Unusable("array size does not fit", f"{name} holds {array.size} values, wanted {wanted} for {shape}")
    return array.reshape(shape)
