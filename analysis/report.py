"""The report: one streaming pass over a trace folder, made into one HTML file that opens anywhere without a network.

Memory is bounded by the counts (which depend on layers, experts and data sets), not by the run. The file carries its
own content security policy: only the scripts written here may run, by their hashes, and nothing may be loaded, so that
even text which slipped past the escaping could neither run nor call home.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from analysis import accuracy_figures, routing_figures
from analysis.figures import Figure, rounded
from analysis.journeys import choose_sequences, encode, make_journeys, numbers, pack, weight_scale
from analysis.palette import expert_colours
from analysis.quality import QualityCounts
from analysis.tokens import readable
from analysis.transitions import TransitionCounts, conditional
from analysis.usage import UsageCounts
from groundwork import atomic
from groundwork.errors import ConfigurationError
from groundwork.progress import Progress, progress
from groundwork.provenance import library_versions
from speculation.predictor import Predictor
from traces.reader import TraceDataset
from traces.schema import TraceSpec

FORMAT_VERSION = 1
EVALUATION_VERSION = 1  # of the evaluation JSON that can be shown
MAX_TRANSITIONS = 2_000_000  # probabilities in one file; layers are thinned out evenly beyond
TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    shard_dir: Path | TraceDataset,
    predictors: Mapping[str, Predictor],
    output: Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    journeys: int = 24,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the HTML report of a trace folder to `output` and return every number it shows, ready for JSON.

    `predictors` are asked for their guesses in `journeys` sequences; `evaluation` is the evaluation JSON, and where it
    is None the accuracy section says how to get one. Raises ConfigurationError when the folder is no trace or lacks a
    column that a predictor requires, when the evaluation is none or one of another model, or `output` is a folder.
    """
    if output.is_dir():
        raise ConfigurationError(
            f"{output}: is a folder, wanted a file to write; name one, such as {output / 'report.html'}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    dataset = shard_dir if isinstance(shard_dir, TraceDataset) else TraceDataset(shard_dir)
    for name, predictor in predictors.items():
        predictor.check_columns(dataset, name)
        predictor.check_shape(dataset, name)
    spec = dataset.spec
    accuracy, scores, differences = _accuracy(evaluation, spec)
    usage = UsageCounts(spec.num_layers, spec.num_experts, [info.dataset for info in dataset.index], seed=seed)
    transitions = TransitionCounts(spec.num_layers, spec.num_experts)
    quality = QualityCounts()
    bar: Progress[None] = progress(total=dataset.num_tokens, description="reading traces", unit="tok")
    with bar:
        for trace in dataset.sequences("all", columns=("weights",)):
            usage.add(trace)
            transitions.add(trace)
            quality.add(trace)
            bar.update(len(trace.expert_ids_TLK))
    chosen = choose_sequences(dataset.index, journeys, seed)
    horizon = int(evaluation["horizon"]) if evaluation is not None else 1
    travelled = make_journeys(dataset, chosen, predictors, horizon)

    run = _describe(dataset, usage, quality)
    routing = routing_figures.make(usage, transitions)
    tokens_shown = _shown_layers(spec.num_layers, spec.num_experts)
    layers_shown = [layer for layer in tokens_shown if layer + 1 < spec.num_layers]
    scale = weight_scale(travelled)
    page_data = {
        "figures": {figure.key: figure.spec for figure in (*routing, *accuracy)},
        "tables": {figure.key: {"columns": figure.columns, "rows": figure.rows} for figure in (*routing, *accuracy)},
        "transitions": {
            "num_experts": spec.num_experts,
            "layers": layers_shown,
            "tokens": tokens_shown,
            "packed": pack(
                routing_figures.conditional_for_page(transitions.across_layers_LEE, layers_shown)
                + routing_figures.conditional_for_page(transitions.across_tokens_LEE, tokens_shown)
            ),
        },
        "journeys": {
            "num_layers": spec.num_layers,
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
            "ordered": spec.expert_order == "weight",
            "has_weights": "weights" in spec.store,
            "weight_scale": scale,
            "predictors": [readable(name) for name in predictors],
            "sequences": [encode(journey, spec.num_experts, scale) for journey in travelled],
        },
        "colours": {mode: expert_colours(spec.num_experts, mode) for mode in ("light", "dark")},
    }
    html = render(
        page_data,
        run=run,
        figures={figure.key: figure for figure in (*routing, *accuracy)},
        headline=_headline(routing, evaluation),
        evaluation=evaluation,
        scores=scores,
        differences=differences,
        predictor_names=list(predictors),
        num_journeys=len(travelled),
    )
    atomic.write_text(output, html)
    return {
        "format_version": FORMAT_VERSION,
        "run": run,
        "figures": {
            figure.key: {
                "title": figure.title,
                "sentence": figure.sentence,
                "columns": figure.columns,
                "rows": figure.rows,
            }
            for figure in (*routing, *accuracy)
        },
        "transitions": {
            "layers": _probabilities(transitions.across_layers_LEE, layers_shown),
            "tokens": _probabilities(transitions.across_tokens_LEE, tokens_shown),
        },
        "evaluation": evaluation,
        "journeys": [numbers(journey) for journey in travelled],
    }


def render(data: Mapping[str, Any], **values: Any) -> str:
    """Fill the page's template; `data` goes in as JSON in which every `<` is written `\\u003c`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = lambda value: readable(str(value))
    scripts = [get_plotlyjs(), *((TEMPLATES / name).read_text("utf-8") for name in ("report.js", "journeys.js"))]
    scripts = [script.replace("\r\n", "\n").replace("</script", "<\\/script") for script in scripts]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts]
    return environment.get_template("report.html.j2").render(
        scripts=[Markup(script) for script in scripts],  # our own files and plotly's, never data
        script_policy=" ".join(f"'sha256-{digest}'" for digest in digests),
        style=Markup((TEMPLATES / "report.css").read_text("utf-8")),
        data=Markup(embedded_json(data)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )


def embedded_json(data: Any) -> str:
    """Return JSON that no HTML parser can leave: `<`, `>` and `&` are written as escapes; NaN is refused."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _describe(dataset: TraceDataset, usage: UsageCounts, quality: QualityCounts) -> dict[str, Any]:
    spec = dataset.spec
    share_LE = usage.share_LE()
    return {
        **spec.to_json(),
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


def _accuracy(
    evaluation: Mapping[str, Any] | None, spec: TraceSpec
) -> tuple[list[Figure], dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the figures and the two tables of an evaluation, which may come from a file that anyone wrote."""
    if evaluation is None:
        return [], None, []
    try:
        for name, wanted in (
            ("format_version", EVALUATION_VERSION),
            *((name, getattr(spec, name)) for name in ("num_layers", "num_experts", "top_k")),
        ):
            if evaluation[name] != wanted:
                raise ConfigurationError(
                    f"the evaluation has {name} {evaluation[name]!r}, but {wanted} is needed here; "
                    "evaluate on traces of the same model"
                )
        return (
            accuracy_figures.make(evaluation),
            accuracy_figures.score_table(evaluation),
            accuracy_figures.difference_table(evaluation),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigurationError(
            f"the evaluation is not what 'expert-speculation evaluate --json' writes ({type(error).__name__}: {error})"
        ) from error


def _headline(routing: Sequence[Figure], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the numbers at the top of the page: data-set information, best predictor and best baseline."""
    information = [row[1] for figure in routing if figure.key == "information" for row in figure.rows]
    headline: dict[str, Any] = {"information": max(information, default=0.0), "predictor": None, "baseline": None}
    if evaluation is None:
        return headline
    budget = str(evaluation["top_k"])
    for kind in ("predictor", "baseline"):
        recalls = {
            name: scores["recall"][budget]["value"]
            for name, scores in evaluation["predictors"].items()
            if (name in accuracy_figures.BASELINES) == (kind == "baseline") and scores["recall"].get(budget)
        }
        if recalls:
            best = max(recalls, key=lambda name: recalls[name])
            headline[kind] = {"name": readable(best), "per_cent": 100 * recalls[best]}
    return headline


def _shown_layers(num_layers: int, num_experts: int) -> list[int]:
    """Return the layers whose transitions the file carries: all, or as many evenly spaced ones as fit."""
    most = max(1, MAX_TRANSITIONS // (2 * num_experts**2))
    if num_layers <= most:
        return list(range(num_layers))
    return sorted({round(float(layer)) for layer in np.linspace(0, num_layers - 1, most)})


def _probabilities(counts_LEE: NDArray[np.int64], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return P(next | this) of the given layers as nested lists, None in the rows of experts never selected."""
    probability = rounded(conditional(counts_LEE[list(layers)]), 5)
    return [{"layer": layer, "probability": rows} for layer, rows in zip(layers, probability, strict=True)]
