"""Section of the overview: the model and run behind every number, and what to know of the data before trusting them."""

from typing import Any

from analysis.counts.quality import QualityCounts
from analysis.counts.usage import UsageCounts
from analysis.figures import Section
from groundwork.provenance import library_versions
from traces.reader import TraceDataset


def make(dataset: TraceDataset, usage: UsageCounts, quality: QualityCounts) -> Section:
    """Return the section; `numbers["run"]` also fills the head of the page."""
    run = _describe(dataset, usage, quality)
    return Section(
        key="overview",
        title="What was traced",
        lead="The model and the run behind every number below, and what to know of the data before trusting them.",
        headline=(
            ("MoE layers", str(dataset.spec.num_layers)),
            ("experts per layer", str(dataset.spec.num_experts)),
            ("experts per token", str(dataset.spec.top_k)),
        ),
        partial="overview.html.j2",
        values={"run": run},
        numbers={"run": run},
    )


def _describe(dataset: TraceDataset, usage: UsageCounts, quality: QualityCounts) -> dict[str, Any]:
    share_LE = usage.share_LE()
    return {
        **dataset.spec.to_json(),
        "num_sequences": dataset.num_sequences,
        "num_tokens": dataset.num_tokens,
        "num_shards": len(dataset.shard_paths),
        "bytes": sum(path.stat().st_size for path in dataset.shard_paths),
        "datasets": [
            {"name": name, "sequences": int(usage.sequences_D[row]), "tokens": int(usage.tokens_D[row])}
            for row, name in enumerate(usage.datasets)
        ],
        "quality": quality.summary([info.num_tokens for info in dataset.index], [info.split for info in dataset.index])
        | {"unused_experts": int((share_LE == 0).sum()), "available": sorted(dataset.available)},
        "report_versions": library_versions(),
    }
