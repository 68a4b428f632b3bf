"""The evaluation protocol: predictors and baselines on the same sequences, with intervals and paired differences.

One streaming pass; what is kept is a sum per predictor, sequence, layer and metric, whatever the number of tokens.
Headline figures average over all tokens and the layers that have a layer `horizon` below them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, progress
from speculation.bootstrap import Floats
from speculation.calibration import ReliabilityTally
from speculation.counted import BASELINES_FILE, Repeat, RoutingCounts, baselines_from, count_routing
from speculation.features import packed_batches
from speculation.metrics import layer_sums, metric_names, position_sums, token_values
from speculation.predictor import MAX_HORIZON, OPTIONAL_COLUMNS, Predictor, RoutingShape
from speculation.summary import Summary
from traces.reader import TraceDataset

FORMAT_VERSION = 1
BATCH_TOKENS = 4096
BASELINES = ("chance", "frequency", "repeat", "markov")


@dataclass
class _Tally:
    """Per-sequence sums of one pass: sums[name] grows to (S, L, M), position_sums[name] to (S, P)."""

    tokens: list[int] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    sums: dict[str, list[Floats]] = field(default_factory=dict)
    position_tokens: list[Floats] = field(default_factory=list)
    position_sums: dict[str, list[Floats]] = field(default_factory=dict)
    reliability: dict[str, ReliabilityTally] = field(default_factory=dict)


def evaluate(
    dataset: TraceDataset,
    predictors: Mapping[str, Predictor],
    *,
    split: str = "test",
    horizon: int = 1,
    only: Collection[str] = (),
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores predictors (by the name they shall have in the result) on a split, beside chance and the baselines.

    `only` keeps just the sequences of these data sets; the baselines are fitted as if all were scored.
    Raises ConfigurationError when the split is empty, the horizon leaves no layer, or a predictor does not fit the
    traces.
    """
    shape = RoutingShape.of(dataset)
    if not 1 <= horizon <= min(MAX_HORIZON, shape.num_layers - 1):
        raise ConfigurationError(
            f"--horizon {horizon}: a model of {shape.num_layers} MoE layers has predictions 1 to "
            f"{min(MAX_HORIZON, shape.num_layers - 1)} layers ahead"
        )
    for predictor in predictors.values():
        origin = str(predictor.folder_ or predictor.name)
        predictor.check_shape(dataset, origin)
        predictor.check_columns(dataset, origin)
    notes: list[str] = []
    everyone = {**predictors, **_baselines(dataset, predictors, split, notes)}
    names = metric_names(shape, dataset.spec.expert_order == "weight")
    tally = _tally(dataset, everyone, split, horizon, names, only)
    if not tally.tokens:
        raise ConfigurationError(f"--split {split}: holds no sequence of these traces; use --split all or collect more")

    summary = Summary(shape, horizon, names, dataset.spec.moe_layers, bootstrap, seed)
    tokens_S = np.array(tally.tokens, dtype=np.float64)
    sums = {name: np.concatenate(parts) for name, parts in tally.sums.items()}
    results: dict[str, Any] = {}
    for name, predictor in everyone.items():
        results[name] = {
            "sees": predictor.sees(dataset.available),
            **summary.of(sums[name], tokens_S),
            "by_dataset": {
                each: summary.of_part(sums[name], tokens_S, np.array([source == each for source in tally.datasets]))
                for each in sorted(set(tally.datasets))
            },
            "by_position": summary.by_position(
                np.concatenate(tally.position_sums[name]), np.concatenate(tally.position_tokens)
            ),
            "calibration": (
                tally.reliability[name].result(resamples=bootstrap, seed=seed) if name in tally.reliability else None
            ),
        }
    results["chance"] = {"sees": [], **summary.of_chance()}
    results["chance"]["by_dataset"] = summary.chance_by_dataset(tally.datasets, tokens_S)
    return {
        "format_version": FORMAT_VERSION,
        "model": dataset.spec.model_name,
        "split": split,
        "only_dataset": sorted(only),
        "horizon": horizon,
        "num_layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "expert_order": dataset.spec.expert_order,
        "sequences": len(tally.tokens),
        "tokens": int(tokens_S.sum()),
        "bootstrap": bootstrap,
        "seed": seed,
        "notes": notes,
        "predictors": {name: results[name] for name in _order(predictors, results)},
        "differences": summary.differences(sums, tokens_S, list(predictors)),
    }


def format_table(result: Mapping[str, Any]) -> str:
    """The result as text for a terminal: one row per predictor, and whom each given predictor is better than."""
    top_k = result["top_k"]
    wide = str(max(int(b) for b in result["predictors"]["chance"]["recall"]))
    first = "hit@1" if result["expert_order"] == "unknown" else "top-1"
    header = ["predictor", f"recall@{top_k} [95 %]", f"recall@{wide}", first, "exact set"]
    rows = [header]
    for name, figures in result["predictors"].items():
        recall = figures["recall"][str(top_k)]
        best = figures["hit_at_1"] if figures["top_n_accuracy"] is None else figures["top_n_accuracy"]["1"]
        rows.append(
            [
                name,
                f"{recall['value']:.3f} [{recall['low']:.3f}, {recall['high']:.3f}]",
                f"{figures['recall'][wide]['value']:.3f}",
                f"{best['value']:.3f}",
                f"{figures['exact_set']['value']:.3f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for name in dict.fromkeys(difference["a"] for difference in result["differences"]):
        beaten = [d["b"] for d in result["differences"] if d["a"] == name and d["low"] > 0]
        if beaten:
            lines.append(
                f"{name} is better than {', '.join(beaten)}: the paired difference in recall@{top_k} excludes 0"
            )
    lines.append(
        f"{result['sequences']:,} sequences, {result['tokens']:,} tokens of split {result['split']}, "
        f"{result['horizon']} layer{'s' if result['horizon'] > 1 else ''} ahead"
    )
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)


def training_counts(
    dataset: TraceDataset, predictors: Mapping[str, Predictor], split: str, notes: list[str]
) -> RoutingCounts | None:
    """Counts that no sequence of `split` has part in: of the train split, else of a predictor folder, else None.

    Adds to `notes` where they are not simply those of the train split.
    """
    held_out = {name for p in predictors.values() for name in p.provenance_.get("hold_out_dataset", ())}
    held_out &= set(dataset.datasets)
    if split == "all":
        return _counts_of_folders(predictors, RoutingShape.of(dataset), notes)
    if any(info.split == "train" and info.dataset not in held_out for info in dataset.index):
        if held_out:
            notes.append(
                f"frequency and markov were fitted without {', '.join(sorted(held_out))}, as a predictor given was"
            )
        return count_routing(dataset, "train", held_out)
    notes.append("these traces have no train split to fit baselines on")
    return _counts_of_folders(predictors, RoutingShape.of(dataset), notes)


def _baselines(
    dataset: TraceDataset, predictors: Mapping[str, Predictor], split: str, notes: list[str]
) -> dict[str, Predictor]:
    """frequency, repeat and markov, with counts from where the protocol says; those of a name given are left out."""
    counts = training_counts(dataset, predictors, split, notes)
    found = {"repeat": Repeat()} if counts is None else baselines_from(counts, RoutingShape.of(dataset))
    given = sorted(found.keys() & predictors.keys())
    notes += [f"{name} is the predictor given, not one fitted for this evaluation" for name in given]
    return {name: predictor for name, predictor in found.items() if name not in predictors}


def _counts_of_folders(
    predictors: Mapping[str, Predictor], shape: RoutingShape, notes: list[str]
) -> RoutingCounts | None:
    for name, predictor in predictors.items():
        if predictor.folder_ is not None and (predictor.folder_ / BASELINES_FILE).is_file():
            counts = RoutingCounts.load(predictor.folder_ / BASELINES_FILE, shape)
            notes.append(f"frequency and markov use the counts of the traces that {name} was trained on")
            return counts
    notes.append("frequency and markov are left out: no predictor folder with their counts was given")
    return None


def _tally(
    dataset: TraceDataset,
    predictors: Mapping[str, Predictor],
    split: str,
    horizon: int,
    names: list[str],
    only: Collection[str],
) -> _Tally:
    columns = {column for p in predictors.values() for column in p.sees(dataset.available)} & OPTIONAL_COLUMNS
    tally = _Tally(sums={name: [] for name in predictors}, position_sums={name: [] for name in predictors})
    recall = names.index(f"recall@{dataset.spec.top_k}")
    stream = dataset.sequences(split, sorted(columns), only=only)
    bar: Progress[None] = progress(description=f"evaluating on {split}", unit="tokens")
    with bar:
        for group, batch in packed_batches(stream, dataset.spec, BATCH_TOKENS):
            tally.tokens += batch.sequence_lengths.tolist()
            tally.datasets += [sequence.dataset for sequence in group]
            ones_T = torch.ones(batch.num_tokens, dtype=torch.float64)
            tally.position_tokens.append(position_sums(ones_T, batch).numpy())
            for name, predictor in predictors.items():
                scores_TLE = predictor.predict_scores(batch, horizon)
                values_TLM = token_values(scores_TLE, batch, names)
                tally.sums[name].append(layer_sums(values_TLM, batch).numpy())
                headline_T = values_TLM[:, horizon:, recall].mean(dim=1)
                tally.position_sums[name].append(position_sums(headline_T, batch).numpy())
                probabilities_TLE = predictor.probabilities(scores_TLE, horizon)
                if probabilities_TLE is not None:
                    headline = replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:, horizon:])
                    tally.reliability.setdefault(name, ReliabilityTally()).add(probabilities_TLE[:, horizon:], headline)
            bar.update(batch.num_tokens)
    return tally


def _order(predictors: Mapping[str, Predictor], results: Mapping[str, Any]) -> list[str]:
    return [*predictors, *(name for name in BASELINES if name in results and name not in predictors)]
