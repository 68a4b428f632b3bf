"""How often each layer uses each expert, by data set, and whether that says more about the data set than chance would.

Everything is counted in one pass. The permutation test needs no second one: the shuffled labels of all sequences are
drawn beforehand, and each sequence is added to its true data set and, for every permutation, to its shuffled one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.schema import SequenceTrace

NULL_BYTES = (
    96 * 2**20
)  # memory that the shuffled counts may take; fewer permutations are made where they would take more
MIN_PERMUTATIONS = 20


@dataclass(frozen=True, eq=False)
class MutualInformation:
    """Mutual information between data set and routed expert, in bits per layer, and its value under shuffled labels."""

    bits_L: NDArray[np.float64]
    shuffled_mean_L: NDArray[np.float64]
    shuffled_low_L: NDArray[np.float64]  # 2.5 % quantile over permutations
    shuffled_high_L: NDArray[np.float64]  # 97.5 % quantile
    p_value_L: NDArray[np.float64]  # (1 + permutations at least as large) / (1 + permutations)
    permutations: int


class UsageCounts:
    """Counts of routed experts by data set (D), layer (L) and expert (E), with P shuffled copies.

    `sequence_datasets` holds the data set of every sequence that will be added, in any order: labels are permuted over
    sequences, never over tokens, because tokens of one sequence are not independent.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        sequence_datasets: Sequence[str],
        *,
        permutations: int = 200,
        seed: int = 0,
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.datasets = sorted(set(sequence_datasets))
        self._row_of = {name: row for row, name in enumerate(self.datasets)}
        shape = (len(self.datasets), num_layers, num_experts)
        self.counts_DLE = np.zeros(shape, dtype=np.int64)
        self.first_counts_LE = np.zeros(shape[1:], dtype=np.int64)
        self.tokens_D = np.zeros(len(self.datasets), dtype=np.int64)
        self.sequences_D = np.zeros(len(self.datasets), dtype=np.int64)
        if len(self.datasets) < 2:
            permutations = 0
        elif self.counts_DLE.nbytes:
            permutations = min(permutations, max(MIN_PERMUTATIONS, NULL_BYTES // self.counts_DLE.nbytes))
        labels_S = np.array([self._row_of[name] for name in sequence_datasets], dtype=np.int32)
        rng = np.random.default_rng(seed)
        self._labels_PS = np.stack([rng.permutation(labels_S) for _ in range(permutations)]) if permutations else None
        self._shuffled_PDLE = np.zeros((permutations, *shape), dtype=np.int64)
        self._added = 0

    def add(self, trace: SequenceTrace) -> None:
        """Add one sequence; raises ValueError for a data set or a sequence that was not announced."""
        if trace.dataset not in self._row_of:
            raise ValueError(f"data set {trace.dataset!r} was not announced; known: {', '.join(self.datasets)}")
        counts_LE = count_experts(trace.expert_ids_TLK, self.num_experts)
        row = self._row_of[trace.dataset]
        self.counts_DLE[row] += counts_LE
        self.first_counts_LE += count_experts(trace.expert_ids_TLK[:, :, :1], self.num_experts)
        self.tokens_D[row] += len(trace.expert_ids_TLK)
        self.sequences_D[row] += 1
        if self._labels_PS is not None:
            if self._added >= self._labels_PS.shape[1]:
                raise ValueError(f"more sequences were added than the {self._labels_PS.shape[1]} announced")
            permutations = np.arange(len(self._labels_PS))
            self._shuffled_PDLE[permutations, self._labels_PS[:, self._added]] += counts_LE
        self._added += 1

    def share_LE(self) -> NDArray[np.float64]:
        """Return each expert's share of its layer's selections; rows sum to 1 (or are 0 where nothing was traced)."""
        return _shares(self.counts_DLE.sum(axis=0))

    def first_share_LE(self) -> NDArray[np.float64]:
        """Return each expert's share of its layer's first choices; meaningful where `expert_order` is `weight`."""
        return _shares(self.first_counts_LE)

    def difference_DLE(self) -> NDArray[np.float64]:
        """Return each data set's share less the mean share over data sets, which weighs every data set alike."""
        share_DLE = _shares(self.counts_DLE)
        return np.asarray(share_DLE - share_DLE.mean(axis=0))

    def mutual_information(self) -> MutualInformation | None:
        """Compare data-set information with shuffled labels; None where there are fewer than two data sets."""
        if self._labels_PS is None:
            return None
        bits_L = information_bits(np.moveaxis(self.counts_DLE, 1, 0))
        shuffled_PL = information_bits(np.moveaxis(self._shuffled_PDLE, 2, 1))
        low_L, high_L = np.quantile(shuffled_PL, (0.025, 0.975), axis=0)
        at_least_L = (shuffled_PL >= bits_L - 1e-12).sum(axis=0)
        return MutualInformation(
            bits_L=bits_L,
            shuffled_mean_L=shuffled_PL.mean(axis=0),
            shuffled_low_L=low_L,
            shuffled_high_L=high_L,
            p_value_L=(1 + at_least_L) / (1 + len(shuffled_PL)),
            permutations=len(shuffled_PL),
        )


def count_experts(expert_ids_TLK: NDArray[np.integer], num_experts: int) -> NDArray[np.int64]:
    """Return counts_LE of the experts in `expert_ids_TLK`."""
    num_layers = expert_ids_TLK.shape[1]
    offset_L1 = np.arange(num_layers, dtype=np.int64)[:, None] * num_experts
    flat = (expert_ids_TLK.astype(np.int64) + offset_L1).ravel()
    return np.bincount(flat, minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def information_bits(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mutual information, in bits, between the last two axes of joint counts [..., rows, columns]."""
    total = counts.sum(axis=(-2, -1), keepdims=True)
    joint = counts / np.maximum(total, 1)
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return np.asarray((joint * np.log2(ratio)).sum(axis=(-2, -1)))


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))
