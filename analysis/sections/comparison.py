"""Section of the comparison: two runs side by side, and where the texts are the same, how far their routing agrees."""

from collections.abc import Iterator
from typing import Any

from analysis.counts.comparison import Comparison
from analysis.figures import Figure, Notice, Section, grouped, rounded, shortened
from analysis.sections import comparison_agreement, comparison_usage
from analysis.tokens import readable
from traces.reader import TraceDataset
from traces.schema import TraceSpec

DIVERGENCE_KEYS = ("layer", "bits", "exchanged_mean", "exchanged_low", "exchanged_high", "p", "q")
SAME_TEXTS = "expert-speculation collect --datasets NAMES --seed N --max_length T --output_dir RUN"


def make(first: TraceDataset, second: TraceDataset, comparison: Comparison) -> Section:
    """Return the section of two runs; what their shapes or texts do not allow to compare is said in notices."""
    names = run_names(first, second)
    return Section(
        key="comparison",
        title="Comparison of two runs",
        lead=(
            f"{names[0]}, which all other sections describe, beside {names[1]}. An expert's number stands for the same "
            "expert in both only where one model was made from the other, by quantising or fine-tuning it, or where "
            "both are the same."
        ),
        figures=tuple(_figures(comparison, names, (first.spec.top_k, second.spec.top_k))),
        notices=tuple(Notice(text, commands) for text, commands in _reasons(comparison, first.spec, second.spec)),
        partial="comparison.html.j2",
        values={"names": names, "facts": _facts(first, second, comparison)},
        numbers={"comparison": _numbers(comparison, names, (first, second))},
    )


def run_names(first: TraceDataset, second: TraceDataset) -> tuple[str, str]:
    """Return what to call two runs: the names of their folders, with as many parents as tell them apart."""
    folders = [run.shard_paths[0].resolve().parent for run in (first, second)]
    parts = [(folder.parent if folder.name == "data" else folder).parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        shown = [readable("/".join(part[-depth:])) for part in parts]
        if shown[0] != shown[1]:
            return shown[0], shown[1]
    return f"{shown[0]} (first)", f"{shown[1]} (second)"


def _figures(comparison: Comparison, names: tuple[str, str], top_k: tuple[int, int]) -> Iterator[Figure]:
    """Yield the figures that two runs, by their names, allow."""
    if comparison.agreement is not None and comparison.expected_shared_L is not None:
        yield comparison_agreement.agreement_figure(comparison.agreement, comparison.expected_shared_L, top_k)
        yield comparison_agreement.dataset_figure(comparison.agreement)
        if "weight_distance" in comparison.agreement:
            yield comparison_agreement.weight_figure(comparison.agreement)
    if comparison.divergence is not None:
        yield comparison_usage.divergence_figure(comparison)
        yield comparison_usage.share_figure(comparison, names)
    yield comparison_usage.effective_figure(comparison, names)


def _reasons(comparison: Comparison, first: TraceSpec, second: TraceSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what is not compared and why, with the commands that would allow it."""
    total = comparison.sequences
    if first.num_layers != second.num_layers:
        yield (
            f"The runs have {first.num_layers} and {second.num_layers} MoE layers, and no layer of one stands for a "
            "layer of the other: neither usage nor routing is compared layer by layer.",
            (),
        )
    if first.num_experts != second.num_experts:
        yield (
            f"The runs have {first.num_experts} and {second.num_experts} experts per layer, so that an expert's number "
            "does not mean the same in both: neither usage nor routing is compared expert by expert.",
            (),
        )
    if comparison.divergence is not None and not comparison.matched_sequences:
        yield (
            f"No text stands in both runs (by their {comparison.matched_by}), so the routing is not compared token by "
            "token. Collect both with the same texts, lengths and tokenizer:",
            (SAME_TEXTS,),
        )
        return
    if comparison.agreement is None:
        return
    if not comparison.all_matched:
        yield (
            f"{grouped(comparison.matched_sequences)} sequences are the same text in both runs (by their "
            f"{comparison.matched_by}); {grouped(total[0] - comparison.matched_sequences)} of the first and "
            f"{grouped(total[1] - comparison.matched_sequences)} of the second have no partner and are left out of the "
            "agreement.",
            (),
        )
    if first.top_k != second.top_k:
        yield (
            f"A token has {first.top_k} experts in one run and {second.top_k} in the other: sets can not be equal, and "
            "shared experts are counted as a share of the smaller set.",
            (),
        )
    if "first_choice" not in comparison.agreement:
        yield ("One of the runs does not know the order of a token's experts, so first choices are not compared.", ())
    if "weight_distance" not in comparison.agreement:
        yield (
            "One of the runs does not hold the routing weights, so these are not compared. Collect them:",
            ("expert-speculation collect --store weights",),
        )
    if first.tokenizer_hash and second.tokenizer_hash and first.tokenizer_hash != second.tokenizer_hash:
        yield (
            f"The runs name different tokenizers; texts were matched by their {comparison.matched_by} all the same.",
            (),
        )


def _facts(first: TraceDataset, second: TraceDataset, comparison: Comparison) -> list[tuple[str, str, str, bool]]:
    """Return rows of the table of both runs: name, first, second, whether they differ."""

    def of(run: TraceDataset) -> dict[str, str]:
        spec = run.spec
        return {
            "model": readable(spec.model_name)
            + (f" at {readable(spec.model_revision)}" if spec.model_revision else ""),
            "MoE layers, experts, experts per token": f"{spec.num_layers}, {spec.num_experts}, {spec.top_k}",
            "precision: model, router": f"{_known(spec.model_dtype)}, {_known(spec.router_dtype)}",
            "quantisation": _known(spec.quantization),
            "order of a token's experts": "by falling weight" if spec.expert_order == "weight" else "not known",
            "columns": ", ".join(sorted(run.available)),
            "sequences, tokens": f"{grouped(run.num_sequences)}, {grouped(run.num_tokens)}",
            "data sets": shortened(", ".join(map(readable, sorted(run.datasets))), 200),
        }

    left, right = of(first), of(second)
    rows = [(name, left[name], right[name], left[name] != right[name]) for name in left]
    matched = grouped(comparison.matched_sequences)
    return [*rows, (f"sequences of the same text, by their {comparison.matched_by}", matched, matched, False)]


def _known(text: str) -> str:
    """Return a fact of a trace in the words of the page."""
    return "not known" if text == "unknown" else readable(text)


def _numbers(comparison: Comparison, names: tuple[str, str], runs: tuple[TraceDataset, TraceDataset]) -> dict[str, Any]:
    """Return the section's numbers beyond its tables, ready for JSON."""
    return {
        "runs": [
            {"name": name, "num_tokens": run.num_tokens, "datasets": sorted(run.datasets), **run.spec.to_json()}
            for name, run in zip(names, runs, strict=True)
        ],
        "sequences": list(comparison.sequences),
        "matched_by": comparison.matched_by,
        "matched_sequences": comparison.matched_sequences,
        "divergence": {
            texts: [
                dict(zip(DIVERGENCE_KEYS, row, strict=True))
                for row in comparison_usage.divergence_rows(each)
            ]
            for texts, each in (("all", comparison.divergence), ("same", comparison.divergence_of_pairs))
            if each is not None
        },
        "agreement": comparison.agreement,
        "expected_shared": (
            None if comparison.expected_shared_L is None else rounded(comparison.expected_shared_L, 6)
        ),
        "effective_experts": [rounded(effective_L, 4) for effective_L in comparison.effective_experts()],
    }  # fmt: skip
