"""Format `sglang`: the responses of an SGLang server that was asked to `return_routed_experts`.

`/generate` answers `{"text", "output_ids", "meta_info": {"id", "prompt_tokens", "completion_tokens", "routed_experts",
...}}`, the OpenAI-compatible endpoints `{"id", "choices", "usage", "sglext": {"routed_experts"}}`. `routed_experts` is
base64 of flat little-endian int32 with the logical shape [prompt + completion - 1, layers of the model, K]: the last
token is sampled but never run through the model, and dense layers hold 0. Shape and layers are not in the response.

Read in sgl-project/sglang, 2026: python/sglang/srt/state_capturer/{base,routed_experts}.py (layers are the model's
num_hidden_layers, buffers start as zeros, rows are [start, seqlen - 1)),
test/registered/rl/test_return_routed_experts.py (int32, rows = prompt_tokens + completion_tokens - 1, `sglext` at the
top of OpenAI responses), docs.sglang.io/docs/basic_usage/openai_api_completions (`sgl_ext` within the choice).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from traces.interchange.files import JsonLinesWriter, default_dataset, read_lines
from traces.interchange.record import Dropped, Record, Source, Unusable
from traces.interchange.requests import known_tokens
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

OURS = "expert_speculation"  # what SGLang has no field for, written by export beside its own fields


class SglangSource(Source):
    """The responses of files that hold one response, a list of them, or JSON lines of either; plain, gzip or zstd.

    Memory: one line; a file that is one JSON text over several lines is read whole.
    """

    def __iter__(self) -> Iterator[Record | Dropped]:
        for file, path in enumerate(self.files):
            for row, (where, response) in enumerate(_responses(path)):
                try:
                    if isinstance(response, Unusable):
                        raise response
                    yield self._record(response, file, where, row)
                except Unusable as error:
                    yield Dropped(file, where, error.reason, error.detail)

    def _record(self, response: Any, file: int, where: str, row: int) -> Record:
        if not isinstance(response, dict):
            raise Unusable("not a record", f"{type(response).__name__}, wanted a response object")
        key, prompt, completion, text, meta = _fields_of(response)
        ours = response.get(OURS)
        ours = ours if isinstance(ours, dict) else {}
        flat = decode_array(text, "<i4", "routed_experts")
        layers = ours.get("layers", self.settings.recorded_layers)
        top_k = ours.get("top_k", self.settings.top_k)
        if layers is None or top_k is None:
            raise ConfigurationError(
                f"{where}: SGLang's routed_experts have no shape; give --top_k, and --num_layers or --moe_layers"
            )
        if type(layers) is not int or type(top_k) is not int or min(layers, top_k) < 1:
            raise Unusable("not a record", f"{OURS} says {layers} layers of {top_k} experts")
        tokens = prompt + completion - 1
        if flat.size != tokens * layers * top_k or tokens < 1:
            raise Unusable(
                "array size does not fit",
                f"{flat.size} ids, wanted {prompt} + {completion} - 1 tokens x {layers} layers x {top_k} experts"
                + (", and it starts at a later token" if meta.get("routed_experts_start_len") else ""),
            )
        weights = ours.get("routing_weights")
        weights_flat = None if weights is None else decode_array(weights, "<f2", "routing_weights")
        if weights_flat is not None and weights_flat.size != flat.size:
            raise Unusable("array size does not fit", f"{weights_flat.size} weights for {flat.size} ids")
        token_ids_T, tokens_T = _tokens_of(response, meta, prompt, completion)
        phase_T = np.zeros(tokens, np.uint8)
        phase_T[prompt:] = 1
        named = ours.get("dataset") or self.settings.dataset or default_dataset(self.files[file])
        return Record(
            file=file,
            where=where,
            row=row,
            dataset=as_text(named),
            key=as_text(row if key is None else key),
            ids_TLK=flat.reshape(tokens, layers, top_k),
            weights_TLK=None if weights_flat is None else weights_flat.reshape(tokens, layers, top_k),
            moe_layers=as_layers(ours.get("moe_layers")),
            token_ids_T=as_token_ids(ours["token_ids"]) if "token_ids" in ours else token_ids_T,
            tokens_T=as_strings(ours["tokens"]) if "tokens" in ours else tokens_T,
            phase_T=as_phases(ours["phase"], tokens) if "phase" in ours else phase_T,
        )


def write(sequences: Iterable[SequenceTrace], spec: TraceSpec, folder: Path) -> None:
    """Write `responses.jsonl.gz`: `/generate` responses, with what SGLang has no field for under `expert_speculation`.

    `output_ids` are left out, for the last token that SGLang counts was never run and is not in a trace.
    """
    layers = spec.moe_layers[-1] + 1
    with JsonLinesWriter(folder / "responses.jsonl.gz") as file:
        for sequence in sequences:
            tokens, prompt = sequence.num_tokens, int(np.count_nonzero(sequence.phase_T == 0))
            ours = {
                "dataset": sequence.dataset,
                "layers": layers,
                "top_k": spec.top_k,
                "moe_layers": list(spec.moe_layers),
                "phase": phase_value(sequence.phase_T),
                **known_tokens(sequence),
            }
            if sequence.routing_weights_TLK is not None:
                ours["routing_weights"] = encode_array(spread(sequence.routing_weights_TLK, spec), "<f2")
            meta = {
                "id": sequence.sequence_key,
                "prompt_tokens": prompt,
                "completion_tokens": tokens - prompt + 1,
                "routed_experts": encode_array(spread(sequence.expert_ids_TLK, spec), "<i4"),
            }
            text = "".join(sequence.tokens_T[prompt:])
            file.write({"text": text, "meta_info": meta, OURS: ours})


def spread(values_TLK: NDArray[Any], spec: TraceSpec) -> NDArray[Any]:
    """Return the values with one entry for each layer of the model up to the last MoE layer, zeros in dense ones."""
    tokens, _, top_k = values_TLK.shape
    if spec.moe_layers[-1] + 1 == spec.num_layers:
        return values_TLK
    whole = np.zeros((tokens, spec.moe_layers[-1] + 1, top_k), values_TLK.dtype)
    whole[:, list(spec.moe_layers)] = values_TLK
    return whole


def _responses(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each response with its place; an Unusable stands for what is no JSON."""
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        return
    try:
        parse_json(first[1])
    except Unusable:  # one text over several lines, unless that fails as a whole
        try:
            whole = parse_json(b"".join(line for _, line in read_lines(path)))
        except Unusable:
            whole = None
        if whole is not None:
            yield from _unbatched(whole, str(path))
            return
    for number, line in read_lines(path):
        try:
            yield from _unbatched(parse_json(line), f"{path}:{number}")
        except Unusable as error:
            yield f"{path}:{number}", error


def _unbatched(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        yield from ((f"{where}[{index}]", each) for index, each in enumerate(value))
    else:
        yield where, value


def _fields_of(response: dict[str, Any]) -> tuple[Any, int, int, Any, dict[str, Any]]:
    """Return id, prompt and completion tokens, the array's text and `meta_info` of either kind of response."""
    found = response.get("meta_info")
    meta: dict[str, Any] = found if isinstance(found, dict) else {}
    if meta:
        counts: Any = meta
        key, text = meta.get("id"), meta.get("routed_experts")
    else:
        choices = response.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise Unusable("not a record", "neither meta_info nor one choice: several choices share one token count")
        counts, key = response.get("usage"), response.get("id")
        extras = (each.get(name) for each in (response, choices[0]) for name in ("sglext", "sgl_ext"))
        text = next((each.get("routed_experts") for each in extras if isinstance(each, dict)), None)
    if text is None:
        raise Unusable("no routing", "the response has no routed_experts; was return_routed_experts set?")
    counts = counts if isinstance(counts, dict) else {}
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or prompt < 0 or completion < 0:
        raise Unusable("rows can not be counted", f"prompt_tokens {prompt}, completion_tokens {completion}")
    return key, prompt, completion, text, meta


def _tokens_of(
    response: dict[str, Any], meta: dict[str, Any], prompt: int, completion: int
) -> tuple[NDArray[np.int32] | None, list[str] | None]:
    """Return token ids and strings of the rows as far as the response tells them: -1 and "" elsewhere."""
    given, asked = (meta.get(f"{name}_token_logprobs") for name in ("output", "input"))
    before = [_entry(each) for each in asked] if isinstance(asked, list) and len(asked) == prompt else None
    after = [_entry(each) for each in given] if isinstance(given, list) else None
    sampled = response.get("output_ids")
    if isinstance(sampled, list):
        texts = [text for _, text in after] if after is not None else [""] * len(sampled)
        if len(texts) != len(sampled):
            raise Unusable("rows do not match tokens", f"{len(sampled)} output_ids, {len(texts)} logged tokens")
        after = list(zip(sampled, texts, strict=True))
    if after is not None and len(after) != completion:
        raise Unusable("rows do not match tokens", f"{len(after)} sampled tokens, completion_tokens is {completion}")
    if before is None and after is None:
        return None, None
    rows = (before or [(-1, "")] * prompt) + (after or [(-1, "")] * completion)
    rows = rows[: prompt + completion - 1]
    return as_token_ids([token_id for token_id, _ in rows]), [text for _, text in rows]


def _entry(value: Any) -> tuple[Any, str]:
    """Return id and text of an entry [log probability, token id, text or null] of SGLang's token lists."""
    if not isinstance(value, list) or len(value) < 2:
        raise Unusable("not a record", f"a token entry is {str(value)[:60]}, wanted [logprob, id, text]")
    return value[1], as_text(value[2]) if len(value) > 2 and value[2] is not None else ""
