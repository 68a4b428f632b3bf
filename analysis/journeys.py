"""Token journeys: the full routing of a few chosen sequences, with what each predictor had guessed.

The sample is drawn from the index before the pass, evenly over data sets, and from the test split where it has enough,
so that the guesses shown are ones on text that the predictors were not fitted on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.figures import Notice, Section, pack
from analysis.palette import PATHS
from analysis.tokens import readable, readable_tokens
from speculation.features import RoutingBatch
from speculation.predictor import Predictor
from traces.reader import SequenceInfo, TraceDataset
from traces.schema import SequenceTrace, TraceSpec

MAX_TOKENS = 512  # of one sequence; the page stays fast and the file small
SHORT = 8  # sequences with fewer tokens show little and are taken last
SEQUENCE_BYTES = 100_000  # of the file, that a sequence may take in the mean
FEW_SEQUENCES = 24  # as many as there are by default; fewer may take as much as they
LEAST_TOKENS = 16  # that are shown of a sequence however large a token is
WEIGHT_STEP = 5  # of 255, of coarse weights


@dataclass(frozen=True, eq=False)
class Journey:
    """One sequence's routing and, per predictor, its K guesses best first (`guesses[name]`, shape [T, L, K])."""

    dataset: str
    sequence_id: int
    sequence_key: str
    split: str
    num_tokens: int  # of the whole sequence; the arrays are cut at MAX_TOKENS or fewer
    tokens_T: list[str]
    expert_ids_TLK: NDArray[Any]
    routing_weights_TLK: NDArray[np.float16] | None
    guesses: dict[str, NDArray[Any]]


def choose_sequences(index: Sequence[SequenceInfo], count: int, seed: int = 0) -> list[SequenceInfo]:
    """Return up to `count` sequences, the same number from each data set as far as they reach, sorted by data set."""
    rng = np.random.default_rng(seed)
    by_dataset: dict[str, list[SequenceInfo]] = {}
    for position in rng.permutation(len(index)):
        by_dataset.setdefault(index[position].dataset, []).append(index[position])
    for waiting in by_dataset.values():
        waiting.sort(key=lambda info: (info.num_tokens < SHORT, info.split != "test"))
    chosen: list[SequenceInfo] = []
    rank = 0
    while len(chosen) < min(count, len(index)):
        chosen += [by_dataset[name][rank] for name in sorted(by_dataset) if rank < len(by_dataset[name])]
        rank += 1
    return sorted(chosen[:count], key=lambda info: (info.dataset, info.sequence_id))


def make_journeys(
    dataset: TraceDataset, chosen: Sequence[SequenceInfo], predictors: Mapping[str, Predictor], horizon: int = 1
) -> list[Journey]:
    """Read the chosen sequences and let every predictor guess the K experts of each of their tokens and layers."""
    seen = {column for predictor in predictors.values() for column in predictor.requires | predictor.uses}
    columns = ({"tokens", "weights"} | seen) - {"ids"}
    journeys = {}
    by_row_group = sorted(chosen, key=_row_group)
    for _, infos in groupby(by_row_group, key=_row_group):  # each row group is decoded once
        together = list(infos)
        traces = dataset.read([info.sequence_id for info in together], columns)
        for info, trace in zip(together, traces, strict=True):
            journeys[info.sequence_id] = _journey(dataset, info, _cut(trace, MAX_TOKENS), predictors, horizon)
    return [journeys[info.sequence_id] for info in chosen]


def make(journeys: Sequence[Journey], predictor_names: Sequence[str], spec: TraceSpec) -> Section:
    """Return the section of the journeys; without any, it says how to get them."""
    names = [readable(name) for name in predictor_names]
    scale = weight_scale(journeys)
    fitted = fit(journeys, spec.num_experts, scale)
    notices = []
    if not journeys:
        notices.append(
            Notice(
                "This run holds no sequences to show, or none was asked for:",
                ("expert-speculation report --journeys 24",),
            )
        )
    elif not names:
        notices.append(
            Notice(
                "No predictor was given, so no guesses are shown.",
                ("expert-speculation report --shard_dir RUN --predictor_dir PREDICTOR --output report.html",),
            )
        )
    return Section(
        key="journeys",
        title="Token journeys",
        lead="",
        notices=tuple(notices),
        partial="journeys.html.j2",
        values={
            "num_journeys": len(journeys),
            "predictor_names": names,
            "first_tokens": fitted.tokens if fitted.cut else None,
            "weight_step": f"{WEIGHT_STEP / 255 * scale:.2g}" if fitted.coarse else None,
        },
        data={
            "journeys": {
                "num_layers": spec.num_layers,
                "num_experts": spec.num_experts,
                "top_k": spec.top_k,
                "ordered": spec.expert_order == "weight",
                "has_weights": "weights" in spec.store,
                "weight_scale": scale,
                "predictors": names,
                "path_colours": PATHS,
                "sequences": fitted.encoded,
            }
        },
        numbers={"journeys": [numbers(journey) for journey in fitted.journeys]},
    )


@dataclass(frozen=True)
class Fitted:
    """Journeys as the page holds them, within SEQUENCE_BYTES for each of FEW_SEQUENCES or more."""

    journeys: list[Journey]
    encoded: list[dict[str, Any]]
    tokens: int  # of a sequence, that are shown at most
    cut: bool  # to fewer than MAX_TOKENS
    coarse: bool  # weights are multiples of WEIGHT_STEP / 255 of the largest


def fit(journeys: Sequence[Journey], num_experts: int, scale: float) -> Fitted:
    """Encode journeys; where they would take too much room with coarser weights, then with fewer tokens of each."""
    room = SEQUENCE_BYTES * max(len(journeys), FEW_SEQUENCES)
    shown, tokens, coarse = list(journeys), MAX_TOKENS, False
    while True:
        encoded = [encode(journey, num_experts, scale, WEIGHT_STEP if coarse else 1) for journey in shown]
        size = sum(len(each["packed"]) + len("".join(each["tokens"])) for each in encoded)
        if size <= room or tokens == LEAST_TOKENS:
            return Fitted(shown, encoded, tokens, tokens < MAX_TOKENS, coarse)
        if not coarse and journeys[0].routing_weights_TLK is not None:
            coarse = True
            continue
        lengths = [len(journey.tokens_T) for journey in shown]
        per_token = size / sum(lengths)
        lower = range(min(tokens, max(lengths)) - 1, LEAST_TOKENS - 1, -1)
        fitting = (t for t in lower if per_token * sum(min(length, t) for length in lengths) <= room)
        tokens = next(fitting, LEAST_TOKENS)
        shown = [_first(journey, tokens) for journey in shown]


def weight_scale(journeys: Sequence[Journey]) -> float:
    """Return the largest finite weight of all journeys, 1 where there are none: the unit of the weights in the page."""
    largest = 0.0
    for journey in journeys:
        if journey.routing_weights_TLK is not None and journey.routing_weights_TLK.size:
            largest = max(largest, float(np.nan_to_num(journey.routing_weights_TLK, posinf=0.0, neginf=0.0).max()))
    return largest or 1.0


def encode(journey: Journey, num_experts: int, scale: float, step: int = 1) -> dict[str, Any]:
    """Return what the page needs of a journey; `packed` is base64 of gzip of ids, weights and each predictor's guesses.

    All are arrays [T, L, K]: ids and guesses as uint8, or little-endian uint16 where E > 256; weights as uint8 in units
    of `scale` / 255, multiples of `step` (a divisor of 255), absent where the run has none.
    """
    id_type = "<u1" if num_experts <= 256 else "<u2"
    parts = [journey.expert_ids_TLK.astype(id_type).tobytes()]
    if journey.routing_weights_TLK is not None:
        relative = np.nan_to_num(journey.routing_weights_TLK.astype(np.float32) / scale, posinf=1.0, neginf=0.0)
        parts.append((step * np.rint(255 / step * relative.clip(0.0, 1.0))).astype(np.uint8).tobytes())
    parts += [guess.astype(id_type).tobytes() for guess in journey.guesses.values()]
    return _labels(journey) | {"packed": pack(b"".join(parts))}


def numbers(journey: Journey) -> dict[str, Any]:
    """Return a journey as plain lists, for JSON."""
    weights = journey.routing_weights_TLK
    return _labels(journey) | {
        "expert_ids": journey.expert_ids_TLK.tolist(),
        "routing_weights": None if weights is None else np.round(weights.astype(np.float64), 4).tolist(),
        "guesses": {name: guess.tolist() for name, guess in journey.guesses.items()},
    }


def _first(journey: Journey, tokens: int) -> Journey:
    """Return the first tokens of a journey."""
    weights = journey.routing_weights_TLK
    return replace(
        journey,
        tokens_T=journey.tokens_T[:tokens],
        expert_ids_TLK=journey.expert_ids_TLK[:tokens],
        routing_weights_TLK=None if weights is None else weights[:tokens],
        guesses={name: guess[:tokens] for name, guess in journey.guesses.items()},
    )


def _row_group(info: SequenceInfo) -> tuple[int, int]:
    return info.shard, info.row_group


def _journey(
    dataset: TraceDataset, info: SequenceInfo, trace: SequenceTrace, predictors: Mapping[str, Predictor], horizon: int
) -> Journey:
    batch = RoutingBatch.from_sequences([trace], dataset.spec)
    guesses: dict[str, NDArray[Any]] = {}
    for name, predictor in predictors.items():
        with torch.inference_mode():
            scores_TLE = predictor.predict_scores(batch, horizon=horizon)
        guesses[name] = scores_TLE.topk(dataset.spec.top_k, dim=-1).indices.numpy().astype(np.uint16)
    weights_TLK = trace.routing_weights_TLK
    return Journey(
        dataset=info.dataset,
        sequence_id=info.sequence_id,
        sequence_key=trace.sequence_key,
        split=info.split,
        num_tokens=info.num_tokens,
        tokens_T=readable_tokens(trace.tokens_T),
        expert_ids_TLK=trace.expert_ids_TLK.copy(),  # a copy, so that the row group behind the view can be freed
        routing_weights_TLK=None if weights_TLK is None else weights_TLK.copy(),
        guesses=guesses,
    )


def _labels(journey: Journey) -> dict[str, Any]:
    return {
        "dataset": readable(journey.dataset),
        "sequence_id": journey.sequence_id,
        "sequence_key": readable(journey.sequence_key),
        "split": journey.split,
        "num_tokens": journey.num_tokens,
        "tokens": journey.tokens_T,
    }


def _cut(trace: SequenceTrace, tokens: int) -> SequenceTrace:
    """Keep the first tokens; routing is causal, so this changes nothing for them."""
    if len(trace.token_ids_T) <= tokens:
        return trace
    per_token = ("token_ids_T", "tokens_T", "phase_T", "expert_ids_TLK")
    optional = ("routing_weights_TLK", "router_logits_TLE", "lookahead_logits_THLE")
    present = [*per_token, *(name for name in optional if getattr(trace, name) is not None)]
    return replace(trace, **{name: getattr(trace, name)[:tokens] for name in present})
