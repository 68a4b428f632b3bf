"""Two runs side by side: their usage of the experts, and how far they agree on the texts that both hold.

Each run is read once, in groups of bounded size, beside the narrow columns that tell its texts: the sequences of the
second run that are partners of the first's are read with them, the others afterwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.counts.agreement import Agreement, expected_share
from analysis.counts.divergence import Divergence, UsageDivergence
from analysis.counts.matching import Matches, match_texts
from analysis.counts.specialisation import effective_number
from analysis.counts.usage import count_experts, shares
from groundwork.progress import Progress, progress
from traces.reader import TraceDataset
from traces.schema import SequenceTrace

GROUP_BYTES = 64 * 2**20  # of ids and weights that are held of each run
READ = ("expert_ids", "routing_weights")  # columns of numbers that are held


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two runs allow to compare; None for what they do not."""

    counts: tuple[NDArray[np.int64], NDArray[np.int64]]  # (L, E) of each run, all its sequences
    sequences: tuple[int, int]
    matched_by: str
    matched_sequences: int  # of equal texts
    divergence: Divergence | None  # over all sequences; None where L or E differ
    divergence_of_pairs: Divergence | None  # over the matched ones; None also where there are none
    agreement: dict[str, Any] | None  # as `Agreement.result` returns it, on the matched texts
    expected_shared_L: NDArray[np.float64] | None  # what choices made apart from each other would share there

    @property
    def all_matched(self) -> bool:
        """Say whether every sequence of each run has its partner in the other."""
        return self.sequences == (self.matched_sequences,) * 2

    def effective_experts(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return 2 to the entropy of each layer's usage, for each run: evenly used experts that would be as varied."""
        first_L, second_L = (effective_number(shares(counts_LE)) for counts_LE in self.counts)
        return first_L, second_L


def compare(
    first: TraceDataset, second: TraceDataset, *, permutations: int | None = None, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two runs; where L or E differ, only each one's own usage is counted."""
    matches = match_texts(first, second)
    paired, runs = len(matches.first_N), (first, second)
    shape = (first.spec.num_layers, first.spec.num_experts)
    comparable = shape == (second.spec.num_layers, second.spec.num_experts)
    alone = (len(first.index) - paired, len(second.index) - paired)
    usage = UsageDivergence(*shape, alone, permutations=permutations, seed=seed) if comparable else None
    agreement = Agreement(first.spec, second.spec)
    counts = tuple(np.zeros((run.spec.num_layers, run.spec.num_experts), dtype=np.int64) for run in runs)

    bar: Progress[None] = progress(total=sum(run.num_tokens for run in runs), description="comparing runs", unit="tok")
    with bar:
        for members in _members(first, second, matches):
            counted = {run: count_experts(trace.expert_ids_TLK, runs[run].spec.num_experts) for run, trace in members}
            for run, counts_LE in counted.items():
                counts[run][:] += counts_LE
            if usage is not None and len(members) == 2:
                usage.add_pair(counted[0], counted[1])
                agreement.add(members[0][1], members[1][1])
            elif usage is not None:
                for run, counts_LE in counted.items():
                    usage.add_alone(run, counts_LE)
            bar.update(sum(trace.num_tokens for _, trace in members))

    measured = expected_L = None
    if usage and paired:
        measured = agreement.result(resamples=resamples, seed=seed)
        expected_L = expected_share(usage.paired_counts_RLE, measured["tokens"])
    return Comparison(
        counts=(counts[0], counts[1]),
        sequences=(len(first.index), len(second.index)),
        matched_by=matches.by,
        matched_sequences=paired,
        divergence=usage.of_all() if usage else None,
        divergence_of_pairs=usage.of_pairs() if usage and paired else None,
        agreement=measured,
        expected_shared_L=expected_L,
    )


def _members(first: TraceDataset, second: TraceDataset, matches: Matches) -> Iterator[list[tuple[int, SequenceTrace]]]:
    """Yield every sequence of both runs once as (run, trace), the two of a pair together."""
    partner_S = np.full(len(first.index), -1, dtype=np.int64)
    partner_S[matches.first_N] = matches.second_N
    for positions in _groups(first, np.arange(len(first.index))):
        partners = partner_S[positions]
        others = iter(_read(second, partners[partners >= 0]))
        for trace, partner in zip(_read(first, positions), partners.tolist(), strict=True):
            yield [(0, trace), (1, next(others))] if partner >= 0 else [(0, trace)]
    for positions in _groups(second, np.setdiff1d(np.arange(len(second.index)), matches.second_N)):
        for trace in _read(second, positions):
            yield [(1, trace)]


def _groups(run: TraceDataset, positions_S: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut positions of the index into groups of sequences whose ids and weights take up to GROUP_BYTES, or one."""
    per_token = sum(width * run.spec.dtypes[name].itemsize for name, width in run.spec.widths.items() if name in READ)
    before_S = np.cumsum(run.index.num_tokens_S[positions_S]) - run.index.num_tokens_S[positions_S]
    group_S = before_S * per_token // GROUP_BYTES
    return np.split(positions_S, np.flatnonzero(np.diff(group_S)) + 1) if len(positions_S) else []


def _read(run: TraceDataset, positions_S: NDArray[np.int64]) -> list[SequenceTrace]:
    return run.read(run.index.sequence_id_S[positions_S].tolist(), columns=("weights",))
