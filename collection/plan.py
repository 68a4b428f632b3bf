"""The plan of a run, made before any token is traced: the order of sequences, shard ranges, batches, and a fingerprint.

Sequences of all sources are interleaved at random but evenly, so that every shard holds the run's mix. The fingerprint
covers whatever changes the output: model weights and configuration, token ids, settings, precision, implementations,
kind of device, torch and transformers.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from collection.batching import SMALLEST_PRESET, cut_batches, padding_share, window_tokens
from collection.sampling import Draw, Sequence
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from groundwork.provenance import library_versions
from moe.load import LoadedModel
from moe.routers import RouterLayout
from traces.plan import SEQUENCES_SCHEMA, Plan, PlannedShard, cut_shards, fingerprint
from traces.schema import TraceSpec, decoded_bytes_per_token
from traces.writer import ROW_GROUP_BYTES

_WORDS = 2**17  # of 8 bytes, that are reduced to one in the digest of the weights


@dataclass(frozen=True, eq=False)
class Layout:
    """The order of work: sequences by id, shard ranges, and batches as lists of sequence ids, shard after shard.

    `num_tokens_S` counts what is traced of each sequence: its text and the tokens that are decoded after it.
    """

    sequences: list[Sequence]
    num_tokens_S: list[int]
    shards: list[PlannedShard]
    batches: list[list[int]]

    @property
    def padding_share(self) -> float:
        """Return the share of the positions run through the model that are padding."""
        return padding_share(self.num_tokens_S, self.batches)


def lay_out(draws: list[Draw], spec: TraceSpec, settings: CollectSettings) -> Layout:
    """Order the drawn sequences and cut them into shards of about `shard_size_mb` and batches.

    Shard sizes are estimates: how well routing compresses is known only once it is written.
    Raises ConfigurationError for a sequence too long for a row group.
    """
    sequences = _interleave(draws, settings.seed)
    num_tokens_S = [len(sequence.token_ids_T) + settings.generate for sequence in sequences]
    limit = ROW_GROUP_BYTES // decoded_bytes_per_token(spec)
    if max(num_tokens_S) > limit:
        raise ConfigurationError(
            f"--max_length {settings.max_length}: a sequence has {max(num_tokens_S)} tokens, and at most "
            f"{limit} can be stored together with these columns; lower it, or store fewer columns"
        )
    shards = cut_shards(num_tokens_S, spec, settings.shard_size_mb)
    return Layout(sequences, num_tokens_S, shards, _batches(num_tokens_S, shards, spec, settings))


def lay_out_again(layout: Layout, spec: TraceSpec, settings: CollectSettings) -> Layout:
    """Return the layout with the batches of settings that differ in nothing else."""
    return replace(layout, batches=_batches(layout.num_tokens_S, layout.shards, spec, settings))


def _batches(
    num_tokens_S: list[int], shards: list[PlannedShard], spec: TraceSpec, settings: CollectSettings
) -> list[list[int]]:
    batch_tokens, batch_size = settings.batch_tokens or SMALLEST_PRESET, settings.batch_size
    return [
        [shard.first_sequence + position for position in batch]
        for shard in shards
        for batch in cut_batches(
            num_tokens_S[shard.first_sequence : shard.stop_sequence],
            window=window_tokens(spec, batch_tokens),
            batch_tokens=batch_tokens,
            batch_size=batch_size if isinstance(batch_size, int) else None,
        )
    ]


def model_identity(loaded: LoadedModel, weights: str, spec: TraceSpec) -> dict[str, Any]:
    """Return what a resumed run must share of the loaded model, whose weights have the digest `weights`."""
    return {
        "model": spec.model_name,
        "model_revision": spec.model_revision,
        "model_config": _config_digest(loaded.config),
        "model_weights": weights,
        "tokenizer": spec.tokenizer_hash,
        "quantization": spec.quantization,
        "dtype": spec.model_dtype,
        "attn_implementation": spec.attn_implementation,
        "experts_implementation": spec.experts_implementation,
        "bitsandbytes": None if spec.quantization == "none" else spec.library_versions.get("bitsandbytes"),
    }


def make_plan(layout: Layout, draws: list[Draw], spec: TraceSpec, identity: dict[str, Any]) -> Plan:
    """Return the plan as it is saved; its settings, `identity`, are the fields that a resumed run must share."""
    table = _table(layout)
    rows = hashlib.blake2b(digest_size=16)
    for column in ("source_row", "num_tokens", "shard", "batch"):
        rows.update(table[column].to_numpy().tobytes())
    # Executions give equal results, so a run may be continued in another one; the word stands for all of them.
    digest = fingerprint({**identity, "execution": "resident", "layout": rows.hexdigest()})
    return Plan(
        fingerprint=digest,
        spec=replace(spec, plan_fingerprint=digest),
        settings=identity,
        sources=[each.facts for each in draws],
        shards=layout.shards,
        sequences=table,
    )


def make_spec(loaded: LoadedModel, layout: RouterLayout, settings: CollectSettings) -> TraceSpec:
    """Return what the traces will say of the model; the plan adds its fingerprint."""
    return TraceSpec(
        model_name=loaded.name,
        model_revision=loaded.revision,
        num_layers=layout.num_layers,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        moe_layers=layout.moe_layers,
        expert_order="weight",
        weights_normalized=layout.weights_normalized,
        quantization=loaded.quantization,
        model_dtype=loaded.dtype,
        router_dtype=str(next(layout.sites[0].module.parameters()).dtype).removeprefix("torch."),
        attn_implementation=loaded.attn_implementation,
        experts_implementation=loaded.experts_implementation,
        library_versions=library_versions(),
        tokenizer_hash=loaded.tokenizer_hash,
        seed=settings.seed,
        plan_fingerprint="",
        store=settings.columns,
        horizons=settings.horizons,
        lookahead_norm=settings.lookahead_norm if settings.horizons else None,
        hidden_size=loaded.config.get_text_config().hidden_size if settings.sample_hidden else 0,
        hidden_fraction=float(settings.sample_hidden),
    )


class WeightsDigest:
    """A digest of every bit of every parameter and buffer, of quantisation scales too; equal on all devices.

    Each MiB is reduced to 64 bits where it lies, at about the speed of memory, so 90 GB take seconds and nothing is
    read from disk again: words are mixed, multiplied by fixed random odd numbers and summed modulo 2**64. Any single
    changed value shows for certain; several escape only where they happen to cancel out. No protection from forgery.
    A model may be added in parts; a forward pass may rearrange weights, so they are added before the first.
    """

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._factors = torch.from_numpy(generator.integers(-(2**63), 2**63, _WORDS) | 1)
        self._parts: dict[str, bytes] = {}

    def add(self, model: torch.nn.Module, prefix: str = "") -> None:
        """Take in what of `model`, of which all names begin so, is not on the meta device."""
        for name, tensor in [*model.named_parameters(prefix), *model.named_buffers(prefix)]:
            if tensor.is_meta:
                continue
            state = getattr(tensor, "quant_state", None)  # of 4-bit weights; SCB: the scales of 8-bit ones
            scales = [getattr(state, "absmax", None), getattr(getattr(state, "state2", None), "absmax", None)]
            scales.append(getattr(tensor, "SCB", None))
            parts = [tensor, *(each for each in scales if each is not None)]
            sums = [_checksums(part.detach(), self._factors.to(part.device)) for part in parts]
            self._parts[name] = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + b"".join(sums)

    def hexdigest(self) -> str:
        """Return the digest of all that was added."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._parts):
            digest.update(self._parts[name])
        return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """Return the digest of a whole model."""
    digest = WeightsDigest()
    digest.add(model)
    return digest.hexdigest()


def _checksums(tensor: torch.Tensor, factors: torch.Tensor) -> bytes:
    flat = tensor.reshape(-1)
    step = _WORDS * 8 // flat.element_size()
    words = torch.empty_like(factors)
    sums = []
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].contiguous().view(torch.uint8)
        words.view(torch.uint8)[: part.numel()] = part
        words.view(torch.uint8)[part.numel() :] = 0
        sums.append(((words ^ (words >> 32)) * factors).sum())
    return torch.stack(sums).cpu().numpy().tobytes() if sums else b""


def _interleave(draws: list[Draw], seed: int) -> list[Sequence]:
    """Spread each source evenly over the run, at random places: a source's n-th part of the run holds one sequence."""
    generator = np.random.default_rng([seed, len(draws)])
    places: list[tuple[float, int, int]] = []
    for index, each in enumerate(draws):
        count = len(each.sequences)
        spread: NDArray[np.float64] = (np.arange(count) + generator.random(count)) / max(count, 1)
        places += [(float(place), index, number) for number, place in enumerate(spread)]
    return [draws[index].sequences[number] for _, index, number in sorted(places)]


def _table(layout: Layout) -> pa.Table:
    count = len(layout.sequences)
    shard_S, batch_S = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for shard in layout.shards:
        shard_S[shard.first_sequence : shard.stop_sequence] = shard.index
    for number, batch in enumerate(layout.batches):
        batch_S[batch] = number
    columns = {
        "sequence_id": np.arange(count, dtype=np.uint32),
        "dataset": [sequence.dataset for sequence in layout.sequences],
        "sequence_key": [sequence.key for sequence in layout.sequences],
        "source_row": np.array([sequence.row for sequence in layout.sequences], np.int64),
        "num_tokens": np.array(layout.num_tokens_S, np.int32),
        "shard": shard_S,
        "batch": batch_S,
    }
    return pa.table(columns, schema=SEQUENCES_SCHEMA)


def texts_digests(sequences: list[Sequence]) -> dict[str, str]:
    """Return, by source, a digest of its texts as the model reads them, in their order."""
    digests = {name: hashlib.blake2b(digest_size=16) for name in sorted({each.dataset for each in sequences})}
    for sequence in sequences:
        head = json.dumps([sequence.key, sequence.row, len(sequence.token_ids_T)])
        digests[sequence.dataset].update(head.encode() + sequence.token_ids_T.tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _config_digest(config: Any) -> str:
    """Return a digest of the model's configuration without what says nothing of it: its path, the library's version.

    The modules that bitsandbytes leaves as they are show in the digest of the weights; the list of them is longer in a
    packed model, which has a head.
    """
    values = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    values.pop("_name_or_path", None)
    if isinstance(values.get("quantization_config"), dict):
        values["quantization_config"] = values["quantization_config"] | {"llm_int8_skip_modules": None}
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
