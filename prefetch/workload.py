"""What is decoded: the routing of whole sequences, and the order in which a server takes their tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError
from speculation.predictor import RoutingShape
from traces.reader import TraceDataset


class Schedule(NamedTuple):
    """Decode steps N and their rows R, one for each sequence that a step moves by a token."""

    first_row_N: NDArray[np.int64]  # N + 1; step n's rows end where those of n + 1 begin
    token_R: NDArray[np.int64]
    sequence_R: NDArray[np.int64]
    begins_R: NDArray[np.bool_]  # the first token of its sequence


@dataclass(frozen=True)
class Workload:
    """Routing of S sequences, packed along T."""

    shape: RoutingShape
    expert_ids_TLK: NDArray[np.uint16]
    lengths_S: NDArray[np.int64]
    datasets: list[str]
    decoded: bool
    """False where the traces hold prefill, whose tokens are then taken as if they were decoded one after another."""

    def schedule(self, batch_size: int) -> Schedule:
        """Decode `batch_size` sequences at once; where one ends, the next in order takes its place."""
        first_S = np.cumsum(self.lengths_S) - self.lengths_S
        ends = np.zeros(min(batch_size, len(self.lengths_S)), dtype=np.int64)  # of each place in the batch
        begins_S = np.zeros(len(self.lengths_S), dtype=np.int64)  # in decode steps
        for sequence, length in enumerate(self.lengths_S):
            place = int(ends.argmin())
            begins_S[sequence] = ends[place]
            ends[place] += length
        sequence_R = np.repeat(np.arange(len(self.lengths_S)), self.lengths_S)
        token_R = np.arange(len(sequence_R))
        position_R = token_R - first_S[sequence_R]
        step_R = begins_S[sequence_R] + position_R
        order = np.argsort(step_R, kind="stable")
        first_row_N = np.searchsorted(step_R[order], np.arange(step_R.max() + 2))
        return Schedule(first_row_N.astype(np.int64), token_R[order], sequence_R[order], position_R[order] == 0)

    def most_needed(self, schedule: Schedule) -> int:
        """Return the most experts that one layer needs in one decode step."""
        return int(_most_needed(schedule.first_row_N, schedule.token_R, self.expert_ids_TLK, self.shape.num_experts))

    def next_visits(self, schedule: Schedule) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return when each expert of each row is needed next (R, L, K), and when each is needed first (L * E,).

        In visits: decode step times L, plus the layer; one beyond the last where an expert is not needed again.
        """
        visits = (len(schedule.first_row_N) - 1) * self.shape.num_layers
        if visits >= 2**31 - 1:
            raise ConfigurationError(
                f"{visits:,} visits of layers are more than policy 'belady' counts; leave it out, or simulate a "
                "smaller split"
            )
        return _next_visits(  # type: ignore[no-any-return]
            schedule.first_row_N, schedule.token_R, self.expert_ids_TLK, self.shape.num_experts
        )

    def part(self, tokens: int, seed: int) -> NDArray[np.int64]:
        """Return sequences, drawn at random, that hold at most `tokens` tokens together; at least one, rising."""
        order = np.random.default_rng(seed).permutation(len(self.lengths_S))
        enough = max(1, int(np.searchsorted(np.cumsum(self.lengths_S[order]), tokens, side="right")))
        return np.sort(order[:enough])

    def of(self, sequences: NDArray[np.int64]) -> tuple[Workload, NDArray[np.bool_]]:
        """Return some of the sequences as a workload of their own, and which tokens theirs are."""
        kept_S = np.isin(np.arange(len(self.lengths_S)), sequences)
        kept_T = np.repeat(kept_S, self.lengths_S)
        datasets = [self.datasets[sequence] for sequence in sequences]
        return Workload(
            self.shape, self.expert_ids_TLK[kept_T], self.lengths_S[sequences], datasets, self.decoded
        ), kept_T


def read_workload(dataset: TraceDataset, split: str, only: Collection[str] = ()) -> Workload:
    """Read the routing of a split; raises ConfigurationError where it holds no sequence."""
    traces = list(dataset.sequences(split, (), only=only))
    if not traces:
        raise ConfigurationError(f"--split {split}: holds no sequence of these traces; use --split all or collect more")
    return Workload(
        shape=RoutingShape.of(dataset),
        expert_ids_TLK=np.concatenate([trace.expert_ids_TLK for trace in traces]).astype(np.uint16),
        lengths_S=np.array([len(trace.expert_ids_TLK) for trace in traces]),
        datasets=[trace.dataset for trace in traces],
        decoded=all(bool((trace.phase_T == 1).all()) for trace in traces),
    )


@njit(cache=True)
def _most_needed(first_row_N: Any, token_R: Any, expert_ids_TLK: Any, experts: int) -> int:
    most = 0
    for layer in range(expert_ids_TLK.shape[1]):
        seen_E = np.full(experts, -1)
        for n in range(len(first_row_N) - 1):
            needed = 0
            for row in range(first_row_N[n], first_row_N[n + 1]):
                for expert in expert_ids_TLK[token_R[row], layer]:
                    needed += seen_E[expert] != n
                    seen_E[expert] = n
            most = max(most, needed)
    return most


@njit(cache=True)
def _next_visits(first_row_N: Any, token_R: Any, expert_ids_TLK: Any, experts: int) -> Any:
    steps, layers, top_k = len(first_row_N) - 1, expert_ids_TLK.shape[1], expert_ids_TLK.shape[2]
    next_X = np.full(layers * experts, steps * layers, np.int64)
    next_RLK = np.empty((len(token_R), layers, top_k), np.int32)
    for n in range(steps - 1, -1, -1):
        for row in range(first_row_N[n], first_row_N[n + 1]):
            for layer in range(layers):
                for k in range(top_k):
                    next_RLK[row, layer, k] = next_X[layer * experts + expert_ids_TLK[token_R[row], layer, k]]
        for row in range(first_row_N[n], first_row_N[n + 1]):
            for layer in range(layers):
                for k in range(top_k):
                    next_X[layer * experts + expert_ids_TLK[token_R[row], layer, k]] = n * layers + layer
    return next_RLK, next_X
