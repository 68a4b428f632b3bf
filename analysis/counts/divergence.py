"""How far two runs' usage of the experts lies apart, per layer, and what chance alone would give.

The distance is the Jensen-Shannon divergence in bits: 0 for equal shares, 1 for disjoint ones (Lin 1991, "Divergence
measures based on the Shannon entropy"). Chance is what exchanging the runs' labels gives, over whole sequences: where
both runs hold the same text the two may change places, the others are dealt out anew. All relabellings are counted in
the same pass, as one matrix product per chunk of sequences.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.significance import benjamini_hochberg
from analysis.counts.specialisation import entropy_bits
from analysis.counts.usage import shares

Floats = NDArray[np.float64]

NULL_BYTES = 192 * 2**20  # memory of the relabelled counts; fewer permutations are made where they would take more
MIN_PERMUTATIONS = 20
PERMUTATIONS = 200
PERMUTATIONS_PER_LAYER = 40  # so that a single layer of many can have q = 1 / 40
CHUNK_SEQUENCES = 64


@dataclass(frozen=True, eq=False)
class Divergence:
    """Jensen-Shannon divergence per layer beside its value under exchanged labels, and the shares' differences."""

    bits_L: Floats
    exchanged_mean_L: Floats
    exchanged_low_L: Floats  # 2.5 % quantile over permutations
    exchanged_high_L: Floats  # 97.5 % quantile
    p_value_L: Floats  # (1 + permutations at least as large) / (1 + permutations)
    q_value_L: Floats  # the same for all layers at once, Benjamini-Hochberg
    permutations: int
    difference_LE: Floats  # the second run's share of its layer's selections less the first's
    exchanged_reach: float  # 95 % quantile over permutations of the largest difference of any cell


class UsageDivergence:
    """Usage counts of two runs of the same L and E, over sequences of equal texts and over the others.

    `alone` says how many sequences of each run have no partner: their labels are drawn beforehand.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        alone: tuple[int, int],
        *,
        permutations: int | None = None,
        seed: int = 0,
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        cells = num_layers * num_experts
        permutations = permutations or max(PERMUTATIONS, PERMUTATIONS_PER_LAYER * num_layers)
        permutations = min(permutations, max(MIN_PERMUTATIONS, NULL_BYTES // (2 * 8 * cells)))
        self.paired_counts_RLE = np.zeros((2, num_layers, num_experts), dtype=np.int64)
        self.alone_counts_RLE = np.zeros_like(self.paired_counts_RLE)
        self._rng = np.random.default_rng(seed)
        labels_S = np.repeat([False, True], alone)
        self._labels_PS = np.stack([self._rng.permutation(labels_S) for _ in range(permutations)])
        self._added = 0
        self._moved = {kind: np.zeros((permutations, cells)) for kind in ("paired", "alone")}
        self._waiting: dict[str, list[tuple[NDArray[np.bool_], NDArray[np.int64]]]] = {"paired": [], "alone": []}

    def add_pair(self, first_LE: NDArray[np.int64], second_LE: NDArray[np.int64]) -> None:
        """Add the counts of one text in both runs."""
        self.paired_counts_RLE += np.stack([first_LE, second_LE])
        exchanged_P = self._rng.random(len(self._labels_PS)) < 0.5
        self._wait("paired", exchanged_P, first_LE - second_LE)

    def add_alone(self, run: int, counts_LE: NDArray[np.int64]) -> None:
        """Add the counts of a sequence of run 0 or 1 without a partner; ValueError for more than were announced."""
        if self._added == self._labels_PS.shape[1]:
            raise ValueError(f"more sequences without a partner than the {self._added} announced")
        self.alone_counts_RLE[run] += counts_LE
        self._wait("alone", self._labels_PS[:, self._added], counts_LE)
        self._added += 1

    @property
    def counts_RLE(self) -> NDArray[np.int64]:
        """Return the counts of all sequences of both runs."""
        return self.paired_counts_RLE + self.alone_counts_RLE

    def of_all(self) -> Divergence:
        """Return the divergence over all sequences."""
        exchanged_PX = self.paired_counts_RLE[1].ravel() + self._counted("paired") + self._counted("alone")
        return self._result(self.counts_RLE, exchanged_PX)

    def of_pairs(self) -> Divergence:
        """Return the divergence over the texts that both runs hold."""
        return self._result(self.paired_counts_RLE, self.paired_counts_RLE[1].ravel() + self._counted("paired"))

    def _wait(self, kind: str, takes_part_P: NDArray[np.bool_], counts_LE: NDArray[np.int64]) -> None:
        self._waiting[kind].append((takes_part_P, counts_LE.ravel()))
        if len(self._waiting[kind]) >= CHUNK_SEQUENCES:
            self._counted(kind)

    def _counted(self, kind: str) -> Floats:
        """Return what each permutation adds to the second run's counts [P, L*E], the waiting sequences included."""
        if self._waiting[kind]:
            labels, counts = zip(*self._waiting[kind], strict=True)
            self._moved[kind] += np.stack(labels, axis=1).astype(np.float64) @ np.stack(counts).astype(np.float64)
            self._waiting[kind] = []
        return self._moved[kind]

    def _result(self, counts_RLE: NDArray[np.int64], second_PX: Floats) -> Divergence:
        second_PLE = second_PX.reshape(-1, self.num_layers, self.num_experts)
        first_PLE = counts_RLE.sum(axis=0) - second_PLE
        bits_L = jensen_shannon_bits(counts_RLE[0], counts_RLE[1])
        exchanged_PL = jensen_shannon_bits(first_PLE, second_PLE)
        low_L, high_L = np.quantile(exchanged_PL, (0.025, 0.975), axis=0)
        p_value_L = (1 + (exchanged_PL >= bits_L - 1e-12).sum(axis=0)) / (1 + len(exchanged_PL))
        reach_P = np.abs(shares(second_PLE) - shares(first_PLE)).max(axis=(1, 2))
        return Divergence(
            bits_L=bits_L,
            exchanged_mean_L=exchanged_PL.mean(axis=0),
            exchanged_low_L=low_L,
            exchanged_high_L=high_L,
            p_value_L=p_value_L,
            q_value_L=benjamini_hochberg(p_value_L),
            permutations=len(exchanged_PL),
            difference_LE=shares(counts_RLE[1]) - shares(counts_RLE[0]),
            exchanged_reach=float(np.quantile(reach_P, 0.95)),
        )


def jensen_shannon_bits(first: Floats | NDArray[np.integer[Any]], second: Floats | NDArray[np.integer[Any]]) -> Floats:
    """Return the divergence of the shares of two counts [..., E], in bits: between 0 and 1."""
    left, right = shares(first), shares(second)
    middle = entropy_bits((left + right) / 2)
    return np.asarray(np.maximum(middle - (entropy_bits(left) + entropy_bits(right)) / 2, 0.0))
