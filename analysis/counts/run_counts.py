"""All statistics of one run together, fed from one pass."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol

from threadpoolctl import threadpool_limits

from analysis.counts.cache import StackDistances
from analysis.counts.coactivation import CoactivationCounts
from analysis.counts.layer_information import LayerInformationCounts
from analysis.counts.locality import LocalityCounts
from analysis.counts.quality import QualityCounts
from analysis.counts.token_classes import TokenClassCounts
from analysis.counts.transitions import TransitionCounts
from analysis.counts.usage import UsageCounts
from groundwork.progress import Progress, progress
from traces.reader import TraceDataset
from traces.schema import SequenceTrace

BATCH_SEQUENCES = 64  # handed to the threads at once
THREADS = 2


class Counts(Protocol):
    """A statistic that counts one sequence at a time."""

    def add(self, trace: SequenceTrace) -> None: ...


class RunCounts:
    """The statistics of a run; memory depends on layers, experts and data sets, not on the number of tokens."""

    def __init__(self, dataset: TraceDataset, *, seed: int = 0) -> None:
        shape = (dataset.spec.num_layers, dataset.spec.num_experts)
        self.quality = QualityCounts()
        self.usage = UsageCounts(*shape, [info.dataset for info in dataset.index], seed=seed)
        self.transitions = TransitionCounts(*shape)
        self.layer_information = LayerInformationCounts(*shape)
        self.coactivation = CoactivationCounts(*shape)
        self.locality = LocalityCounts(*shape)
        self.stacks = StackDistances(*shape)
        self.token_classes = TokenClassCounts(*shape, seed=seed)

    def read(self, dataset: TraceDataset) -> "RunCounts":
        """Count every sequence of the run, showing progress, and return self.

        Statistics are counted side by side, each in a thread; a matrix product keeps to its own, because products this
        small lose more by waiting for each other's threads than they gain.
        """
        every = tuple(vars(self).values())
        bar: Progress[None] = progress(total=dataset.num_tokens, description="reading traces", unit="tok")
        traces = dataset.sequences("all", columns=("weights", "tokens"))
        with bar, threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(THREADS) as threads:
            while batch := list(islice(traces, BATCH_SEQUENCES)):
                list(threads.map(lambda counts, batch=batch: _add_all(counts, batch), every))
                bar.update(sum(trace.num_tokens for trace in batch))
        return self


def _add_all(counts: Counts, batch: list[SequenceTrace]) -> None:
    for trace in batch:
        counts.add(trace)
