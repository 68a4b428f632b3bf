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


@dataclass(frozen=True, eq=False)
class Journey:
    """One sequence's routing and, per predictor, its K guesses best first (`guesses[name]`, shape [T, L, K])."""

    dataset: str
    sequence_id: int
    sequence_key: str
    split: str
    num_tokens: int  # of the whole sequence; the arrays are cut at MAX_TOKENS
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
        values={"num_journeys": len(journeys), "predictor_names": names},
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
                "sequences": [encode(journey, spec.num_experts, scale) for journey in journeys],
            }
        },
        numbers={"journeys": [numbers(journey) for journey in journeys]},
    )


def weight_scale(journeys: Sequence[Journey]) -> float:
    """Return the largest finite weight of all journeys, 1 where there are none: the unit of the weights in the page."""
    largest = 0.0
    for journey in journeys:
        if journey.routing_weights_TLK is not None and journey.routing_weights_TLK.size:
            largest = max(largest, float(np.nan_to_num(journey.routing_weights_TLK, posinf=0.0, neginf=0.0).max()))
    return largest or 1.0


def encode(journey: Journey, num_experts: int, scale: float) -> dict[str, Any]:
    """Return what the page needs of a journey; `packed` is base64 of gzip of ids, weights and each predictor's guesses.

    All are arrays [T, L, K]: ids and guesses as uint8, or little-endian uint16 where E > 256; weights as uint8 in units
    of `scale` / 255, absent where the run has none.
    """
    id_type = "<u1" if num_experts <= 256 else "<u2"
    parts = [journey.expert_ids_TLK.astype(id_type).tobytes()]
    if journey.routing_weights_TLK is not None:
        relative = np.nan_to_num(journey.routing_weights_TLK.astype(np.float32) / scale, posinf=1.0, neginf=0.0)
        parts.append(np.rint(255 * relative.clip(0.0, 1.0)).astype(np.uint8).tobytes())
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
