"""What a trace holds: the model and run it came from (`TraceSpec`), the columns of a shard, and one sequence as numpy
arrays.

Shapes: T tokens of one sequence, L MoE layers, E experts, K experts per token, H horizons. Format version 1.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FORMAT_VERSION = 1
OPTIONAL_COLUMNS = ("weights", "logits", "lookahead")
ROUTER_INPUT = "router_input"
HIDDEN = "hidden"  # the store's name of `router_input`, which a fraction of the tokens has
LOOKAHEAD_NORMS = ("next", "own")
PHASES = {"prefill": 0, "decode": 1}
SPEC_KEY = b"routing_trace"  # footer: the spec as JSON, equal in every shard of a run
SHARD_KEY = b"routing_trace_shard"  # footer: this shard's index and sequence range
ROW_GROUP_BYTES = 64 * 2**20  # decoded; what a reader must hold at least
STRING_BYTES = 32  # allowance per token for the three string columns once decoded: offsets, and a short token
NORMALIZED_TOLERANCE = 0.01  # K float16 weights near 1/K sum to 1 within K * 2**-12; ten times that for K = 8


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """The model, run and columns of a trace folder, equal in every shard's footer; ValueError when inconsistent.

    The defaults stand for what is not known or not there.
    """

    model_name: str
    model_revision: str | None = None
    num_layers: int  # L, MoE layers only
    num_experts: int  # E
    top_k: int  # K
    moe_layers: tuple[int, ...]  # index in the model of each MoE layer
    expert_order: Literal["weight", "unknown"]
    weights_normalized: bool | None = None  # whether a token's K weights sum to 1; None where unknown
    quantization: str
    model_dtype: str
    router_dtype: str
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    library_versions: dict[str, str] = field(default_factory=dict, hash=False)
    tokenizer_hash: str | None = None
    seed: int = 0
    plan_fingerprint: str = ""
    store: tuple[str, ...] = ()  # which optional columns exist, of OPTIONAL_COLUMNS and HIDDEN
    horizons: int = 0  # H of lookahead_logits
    lookahead_norm: str | None = None  # one of LOOKAHEAD_NORMS; None where there are none, or it is unknown
    hidden_size: int = 0  # D of router_input
    hidden_fraction: float = 0.0  # of the tokens that have it

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "top_k"):
            if not 1 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} is {getattr(self, name)}, not in 1..65535")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if len(self.moe_layers) != self.num_layers:
            raise ValueError(f"{len(self.moe_layers)} moe_layers for num_layers {self.num_layers}")
        if any(b <= a for a, b in zip((-1, *self.moe_layers), self.moe_layers, strict=False)):
            raise ValueError(f"moe_layers {self.moe_layers} do not rise from 0")
        if self.expert_order not in ("weight", "unknown"):
            raise ValueError(f"expert_order is {self.expert_order!r}, not 'weight' or 'unknown'")
        if set(self.store) - {*OPTIONAL_COLUMNS, HIDDEN} or len(set(self.store)) != len(self.store):
            raise ValueError(f"store {self.store} is not a choice of {', '.join(OPTIONAL_COLUMNS)}")
        if (self.horizons > 0) != ("lookahead" in self.store) or not 0 <= self.horizons <= self.num_layers:
            raise ValueError(
                f"horizons {self.horizons} does not fit store {self.store} and num_layers {self.num_layers}"
            )
        if self.lookahead_norm is not None and (self.lookahead_norm not in LOOKAHEAD_NORMS or not self.horizons):
            raise ValueError(f"lookahead_norm {self.lookahead_norm!r} does not fit horizons {self.horizons}")
        sampled = 1 <= self.hidden_size <= 2**20 and 0 < self.hidden_fraction <= 1
        if sampled != (HIDDEN in self.store) or (not sampled and (self.hidden_size or self.hidden_fraction)):
            raise ValueError(
                f"hidden_size {self.hidden_size}, hidden_fraction {self.hidden_fraction} do not fit store {self.store}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the spec and the format version as JSON-ready values."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a spec; raises ValueError on another format version, wrong fields, or values out of range."""
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
        try:
            values["moe_layers"] = tuple(values["moe_layers"])
            values["store"] = tuple(values["store"])
            _check_types(values)
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"fields of the trace metadata are missing or wrong: {error}") from error

    def to_footer(self) -> dict[bytes, bytes]:
        """Return the Parquet footer entry of the spec: canonical JSON, so that equal specs are equal bytes."""
        return {SPEC_KEY: json.dumps(self.to_json(), sort_keys=True).encode()}

    @classmethod
    def from_footer(cls, metadata: Mapping[bytes, bytes] | None) -> Self:
        """Rebuild the spec from a Parquet footer; raises ValueError where there is none or it is not valid."""
        if metadata is None or SPEC_KEY not in metadata:
            raise ValueError("no routing-trace metadata in the footer")
        values = json.loads(metadata[SPEC_KEY])
        if not isinstance(values, dict):
            raise ValueError("the routing-trace metadata in the footer is not an object")
        return cls.from_json(values)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Return the smallest unsigned type that holds an expert id."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the list columns that exist and a token's shape in each: `expert_ids` (L, K) and so on."""
        layers, experts = self.num_layers, self.num_experts
        optional: dict[str, tuple[str, tuple[int, ...]]] = {
            "weights": ("routing_weights", (layers, self.top_k)),
            "logits": ("router_logits", (layers, experts)),
            "lookahead": ("lookahead_logits", (self.horizons, layers, experts)),
        }
        return {"expert_ids": (layers, self.top_k)} | dict(optional[name] for name in optional if name in self.store)

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Return the list columns that exist and the type of their numbers."""
        return {name: self.id_dtype if name == "expert_ids" else np.dtype(np.float16) for name in self.shapes}

    @property
    def widths(self) -> dict[str, int]:
        """Return the list columns that exist and their numbers per token: `expert_ids` L*K and so on."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


def _check_types(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless fields that come from a file have the types of TraceSpec's."""
    integers = ("num_layers", "num_experts", "top_k", "seed", "horizons")
    texts = ("model_name", "quantization", "model_dtype", "router_dtype", "plan_fingerprint")
    maybe = ("model_revision", "attn_implementation", "experts_implementation", "tokenizer_hash")
    versions = values["library_versions"]
    if not (
        all(type(number) is int for number in (*(values[name] for name in integers), *values["moe_layers"]))
        and all(isinstance(values[name], str) for name in texts)
        and all(isinstance(values[name], str | None) for name in maybe)
        and isinstance(values["weights_normalized"], bool | None)
        and type(values.get("hidden_size", 0)) is int
        and isinstance(values.get("hidden_fraction", 0.0), float)
        and isinstance(versions, dict)
        and all(isinstance(version, str) for version in versions.values())
    ):
        raise ValueError("fields of the trace metadata are of wrong types")


def arrow_schema(spec: TraceSpec) -> pa.Schema:
    """Return the columns of a shard, lists layer-major and of fixed size, with the spec as metadata.

    All but `router_input` are non-null; that is the bytes of float16[L*D], or null in the tokens that do not have it.
    """
    fields = [
        ("dataset", pa.dictionary(pa.int32(), pa.string())),
        ("sequence_id", pa.uint32()),
        ("sequence_key", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.uint32()),
        ("phase", pa.uint8()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
    ]
    for name, width in spec.widths.items():
        value = pa.from_numpy_dtype(spec.id_dtype) if name == "expert_ids" else pa.float16()
        fields.append((name, pa.list_(pa.field("element", value, nullable=False), width)))
    columns = [pa.field(name, kind, nullable=False) for name, kind in fields]
    columns += [pa.field(ROUTER_INPUT, pa.binary())] if HIDDEN in spec.store else []
    return pa.schema(columns, metadata=spec.to_footer())


def decoded_bytes_per_token(spec: TraceSpec) -> int:
    """Return the bytes one token takes in memory, all columns read: exact for numbers, an allowance for strings.

    Of `router_input` it is the share of a token, rounded up.
    """
    numbers = sum(width * spec.dtypes[name].itemsize for name, width in spec.widths.items())
    if HIDDEN in spec.store:
        numbers += 5 + math.ceil(spec.hidden_fraction * spec.num_layers * spec.hidden_size * 2)
    return numbers + 4 + 4 + 1 + 4 + STRING_BYTES


@dataclass(frozen=True, eq=False)
class SequenceTrace:
    """One sequence's routing; columns that were not stored or not asked for are None (`tokens_T`: empty).

    `lookahead_logits_THLE[t, h-1, l]` is layer l's router applied h layers early, zeros where l < h: to layer (l-h)'s
    router input (`lookahead_norm` own), or to what layer l's own norm makes of the residual stream there (next).
    """

    dataset: str
    sequence_id: int
    sequence_key: str
    token_ids_T: NDArray[np.int32]  # -1 where unknown
    tokens_T: list[str]
    phase_T: NDArray[np.uint8]
    expert_ids_TLK: NDArray[Any]  # uint8 or uint16
    routing_weights_TLK: NDArray[np.float16] | None = None
    router_logits_TLE: NDArray[np.float16] | None = None
    lookahead_logits_THLE: NDArray[np.float16] | None = None
    hidden_positions_N: NDArray[np.int64] | None = None  # the N tokens, in order, of which there is the router input
    router_input_NLD: NDArray[np.float16] | None = None

    @property
    def num_tokens(self) -> int:
        """Return T."""
        return int(self.expert_ids_TLK.shape[0])

    def check(self, spec: TraceSpec) -> None:
        """Raise ValueError unless this may be stored as a sequence of `spec`: all columns, shapes, types, values."""
        tokens, layers, experts = self.num_tokens, spec.num_layers, spec.num_experts
        expected: dict[str, tuple[tuple[int, ...], np.dtype[Any], bool]] = {
            "token_ids_T": ((tokens,), np.dtype(np.int32), True),
            "phase_T": ((tokens,), np.dtype(np.uint8), True),
            "expert_ids_TLK": ((tokens, layers, spec.top_k), spec.id_dtype, True),
            "routing_weights_TLK": ((tokens, layers, spec.top_k), np.dtype(np.float16), "weights" in spec.store),
            "router_logits_TLE": ((tokens, layers, experts), np.dtype(np.float16), "logits" in spec.store),
            "lookahead_logits_THLE": (
                (tokens, spec.horizons, layers, experts),
                np.dtype(np.float16),
                "lookahead" in spec.store,
            ),
        }
        for name, (shape, dtype, wanted) in expected.items():
            array = getattr(self, name)
            if (array is not None) != wanted:
                raise ValueError(f"{name} is {'missing' if wanted else 'given'}, but store is {spec.store}")
            if wanted and (array.shape != shape or array.dtype != dtype):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, wanted {dtype} {shape}")
        if tokens == 0 or len(self.tokens_T) != tokens:
            raise ValueError(
                f"{len(self.tokens_T)} token strings for {tokens} tokens; a sequence has at least one token"
            )
        if self.phase_T.max() > max(PHASES.values()):
            raise ValueError(f"phase {self.phase_T.max()}, wanted one of {PHASES}")
        self._check_hidden(spec)
        problem = routing_fault(spec, self.expert_ids_TLK, self.routing_weights_TLK)
        if problem:
            raise ValueError(problem)
        for name in ("router_logits_TLE", "lookahead_logits_THLE", "router_input_NLD"):
            array = getattr(self, name)
            if array is not None and not np.isfinite(array).all():
                raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(array))} values are not finite")

    def _check_hidden(self, spec: TraceSpec) -> None:
        """Raise ValueError unless the router inputs are those of some of the tokens, in order."""
        places, values = self.hidden_positions_N, self.router_input_NLD
        if HIDDEN not in spec.store:
            if values is not None:
                raise ValueError(f"router_input_NLD is given, but store is {spec.store}")
            return
        if places is None or values is None:
            raise ValueError(f"router_input_NLD is missing, but store is {spec.store}")
        shape = (len(places), spec.num_layers, spec.hidden_size)
        if values.shape != shape or values.dtype != np.float16:
            raise ValueError(f"router_input_NLD is {values.dtype} {values.shape}, wanted float16 {shape}")
        if np.any(np.diff(places, prepend=-1, append=self.num_tokens) < 1):
            raise ValueError(f"hidden_positions_N {places.tolist()} do not rise from 0 below {self.num_tokens}")


def routing_fault(spec: TraceSpec, ids_TLK: NDArray[Any], weights_TLK: NDArray[np.float16] | None) -> str | None:
    """Return the first thing that can not be true of these choices, with its token and layer, or None.

    Ids are below E and distinct within a token's K; weights are finite, fall where the spec says so, and sum to 1 where
    it says so.
    """
    faults = [("an expert id of E or more", ids_TLK >= spec.num_experts)]
    if spec.top_k > 1:
        ordered = np.sort(ids_TLK, axis=-1)
        faults.append(("an expert twice", ordered[..., 1:] == ordered[..., :-1]))
    if weights_TLK is not None:
        faults.append(("a weight that is not finite", ~np.isfinite(weights_TLK)))
        if spec.expert_order == "weight":
            faults.append(("weights that rise", weights_TLK[..., 1:] > weights_TLK[..., :-1]))
        if spec.weights_normalized:
            with np.errstate(invalid="ignore"):  # infinities of both signs, which are a fault above
                off = np.abs(weights_TLK.sum(-1, keepdims=True, dtype=np.float32) - 1) > NORMALIZED_TOLERANCE
            faults.append(("weights that do not sum to 1", off))
    for problem, where in faults:
        if where.any():
            token, layer = (int(i) for i in np.argwhere(where)[0][:2])
            return f"token {token}, layer {layer}: {problem}: ids {ids_TLK[token, layer].tolist()}" + (
                f", weights {weights_TLK[token, layer].tolist()}" if weights_TLK is not None else ""
            )
    return None
