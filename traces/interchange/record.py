"""One sequence as another tool recorded it, and what must be true of it before it may be stored.

Nothing is aligned by guess: what can not be proved complete and consistent is dropped whole, with a reason to count it
under. Causal predictors read a sequence from its first token on, so one with a hole would be wrong, not shorter.
Shapes: T tokens, L layers, K experts per token.
"""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.interchange.settings import ImportSettings, layers_text

KEPT_PLACES = 1000  # of each reason; the count goes on


class Unusable(Exception):
    """A record that can not be used: the reason it is counted under, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Dropped:
    """A record that is left out."""

    file: int  # index into the source's files
    where: str  # file and line or array
    reason: str
    detail: str


@dataclass(frozen=True, eq=False)
class Record:
    """One sequence as it came. Ids are integers of any type; `moe_layers` are the layers' numbers where the source
    names them; token ids, strings and phases are None where it does not."""

    file: int
    where: str
    row: int  # place in the file, counted from 0
    dataset: str
    key: str
    ids_TLK: NDArray[Any]
    weights_TLK: NDArray[np.floating[Any]] | None = None
    moe_layers: tuple[int, ...] | None = None
    token_ids_T: NDArray[np.int32] | None = None
    tokens_T: list[str] | None = None
    phase_T: NDArray[np.uint8] | None = None


@dataclass
class Account:
    """What could not be used: how often for which reason, and the first places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    by_file: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, dropped: Dropped) -> None:
        """Count one record that is left out."""
        self.counts[dropped.reason] += 1
        self.by_file[dropped.file][dropped.reason] += 1
        places = self.places.setdefault(dropped.reason, [])
        if len(places) < KEPT_PLACES:
            places.append(f"{dropped.where}: {dropped.detail}")

    def facts(self) -> dict[str, Any]:
        """Return reason -> count and places, most frequent first, JSON-ready."""
        return {name: {"count": count, "places": self.places[name]} for name, count in self.counts.most_common()}

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())


class Source(ABC):
    """The records of some files; can be iterated more than once, always with the same outcome."""

    def __init__(self, files: list[Any], settings: ImportSettings) -> None:
        self.files, self.settings = files, settings

    @abstractmethod
    def __iter__(self) -> Iterator[Record | Dropped]:
        """The records in the order of the files, and what could not be read among them."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing to release
        """Release what the source holds; it may not be iterated afterwards."""


def usable(record: Record, settings: ImportSettings) -> Record:
    """Return the record as it is stored: MoE layers only and numbered, each token's experts by falling weight.

    Equal weights keep their order, and so do experts without weights. Raises Unusable with the first reason why the
    record is not provably complete and consistent, in itself and with the settings.
    """
    tokens, layers, top_k = record.ids_TLK.shape
    if min(tokens, layers, top_k) == 0:
        raise Unusable("no routing", f"an array of shape {list(record.ids_TLK.shape)} holds no choice")
    if top_k != (settings.top_k or top_k):
        raise Unusable("experts per token contradict the options", f"{top_k} experts, --top_k is {settings.top_k}")
    ids_TLK, moe_layers = _moe_layers_of(record, settings)
    _check_ids(ids_TLK, moe_layers, settings.num_experts, declared=bool(settings.moe_layers or record.moe_layers))
    weights_TLK = record.weights_TLK
    if weights_TLK is not None:
        if weights_TLK.shape != record.ids_TLK.shape or weights_TLK.dtype.kind != "f":
            found = f"{weights_TLK.dtype} {list(weights_TLK.shape)}"
            raise Unusable("weights do not fit the experts", f"{found}, wanted floats {list(record.ids_TLK.shape)}")
        if layers != len(moe_layers):
            weights_TLK = weights_TLK[:, list(moe_layers)]
        with np.errstate(over="ignore"):
            stored_TLK = weights_TLK.astype(np.float16)
        bad_TL = ~np.isfinite(stored_TLK).all(-1)
        _refuse(bad_TL, moe_layers, "weight not finite", "a weight is no finite float16", stored_TLK)
        order_TLK = np.argsort(-weights_TLK.astype(np.float64), axis=-1, kind="stable")
        ids_TLK = np.take_along_axis(ids_TLK, order_TLK, -1)
        weights_TLK = np.take_along_axis(stored_TLK, order_TLK, -1)
    for name in ("token_ids_T", "tokens_T", "phase_T"):
        values = getattr(record, name)
        if values is not None and len(values) != tokens:
            raise Unusable("rows do not match tokens", f"{len(values)} entries of {name} for {tokens} rows of experts")
    return replace(record, ids_TLK=ids_TLK, weights_TLK=weights_TLK, moe_layers=moe_layers)


def _moe_layers_of(record: Record, settings: ImportSettings) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return the ids of the MoE layers and these layers' numbers; what is declared dense must hold no choice."""
    layers = record.ids_TLK.shape[1]
    if layers != (settings.num_layers or layers):
        raise Unusable("layers contradict the options", f"{layers} layers, --num_layers is {settings.num_layers}")
    named = record.moe_layers
    if named is not None and settings.moe_layers not in (None, named):
        raise Unusable(
            "layers contradict the options",
            f"its layers are {layers_text(named)}, --moe_layers is {layers_text(settings.moe_layers or ())}",
        )
    moe_layers = named or settings.moe_layers or tuple(range(layers))
    if layers == len(moe_layers):
        return record.ids_TLK, moe_layers
    if layers <= moe_layers[-1]:
        wanted = f"{len(moe_layers)}, or more than {moe_layers[-1]} with the dense ones"
        raise Unusable(
            "layers contradict the options",
            f"{layers} layers, but MoE layers {layers_text(moe_layers)}: wanted {wanted}",
        )
    for layer in sorted(set(range(layers)) - set(moe_layers)):
        ids_TK = record.ids_TLK[:, layer]
        if ((ids_TK > 0) & (ids_TK < settings.num_experts)).any():
            raise Unusable("a layer declared dense holds experts", f"layer {layer} is not among the MoE layers")
    return record.ids_TLK[:, list(moe_layers)], moe_layers


def _check_ids(ids_TLK: NDArray[Any], layers: tuple[int, ...], num_experts: int, *, declared: bool) -> None:
    """Raise Unusable unless every token has K different experts in every layer.

    A layer of zeros only is how engines fill a dense layer. With one expert per token it could also be a layer that
    always chose expert 0; that is believed only where the layer is declared.
    """
    top_k = ids_TLK.shape[-1]
    zero_L = ~ids_TLK.any(axis=(0, 2))
    if zero_L.any() and (top_k > 1 or not declared):
        layer = layers[int(zero_L.argmax())]
        remedy = "it is declared MoE" if declared else "say with --moe_layers which layers are MoE"
        raise Unusable("a layer of zeros that is not declared dense", f"layer {layer} is all 0; {remedy}")
    outside_TL = ((ids_TLK < 0) | (ids_TLK >= num_experts)).any(-1)
    _refuse(outside_TL, layers, "expert id out of range", f"an id is not in 0..{num_experts - 1}", ids_TLK)
    if top_k > 1:
        ordered = np.sort(ids_TLK, axis=-1)
        twice_TL = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        _refuse(twice_TL, layers, "an expert twice", "an expert is named twice", ids_TLK)


def _refuse(bad_TL: Any, layers: tuple[int, ...], reason: str, problem: str, shown_TLK: NDArray[Any]) -> None:
    if bad_TL.any():
        token, layer = (int(i) for i in np.argwhere(bad_TL)[0])
        raise Unusable(reason, f"token {token}, layer {layers[layer]}: {problem}: {shown_TLK[token, layer].tolist()}")
