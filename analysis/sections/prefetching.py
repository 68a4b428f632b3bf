"""Section on prefetching: what fetching experts ahead buys, from the simulation's JSON, with its words explained."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.evaluations import doubted
from analysis.figures import Figure, Notice, Section, grouped
from analysis.sections.prefetching_machines import machines_figure
from analysis.sections.prefetching_rows import bytes_figure, speed_figure
from analysis.sections.prefetching_sweeps import cache_figure, link_figure
from analysis.simulations import UNNAMED, VERB, Simulation, best_row, per_cents, predictor_names
from analysis.tokens import readable

TITLE = "What prefetching buys"
SIMULATE = "expert-speculation simulate --shard_dir RUN --predictor_dir PREDICTOR --hardware rtx-4090"
NO_SIMULATION = Notice(
    "No simulation was given to this report. Where a GPU holds only some of the experts, the others wait for a link; "
    "what fetching them ahead saves on a machine, and whether it is worth it, is simulated from this run's routing:",
    (
        f"{SIMULATE} --json simulation.json",
        "expert-speculation report --shard_dir RUN --simulation simulation.json --output report.html",
    ),
)
NO_SWEEP = Notice(
    "Other sizes of the cache and speeds of the link were left out of this simulation; it tries them with:",
    (f"{SIMULATE} --sweep_tokens 4096 --json simulation.json",),
)
PREFETCHERS = {
    "none": "nothing is fetched before a layer needs it: caching alone",
    "perfect": "guesses that are always right, as many layers ahead as the predictors', and cost no time",
    "oracle": "always right a whole token ahead",
}
POLICIES = {
    "lru": "evicts the expert that was used longest ago",
    "lfu": "evicts the expert that was used least often",
    "lfu_aged": "evicts the expert that was used least often, where older uses count less",
    "static": "keeps the experts that training used most and never evicts them",
    "guided": "evicts the expert expected to be needed last, by the predictor's probabilities and recent use; without "
    "prefetching the predictor serves for this alone",
    "belady": "evicts the expert that is needed last: knows the future, so no machine can have it",
}
FETCHES = {
    "demanded": "fetched only when its layer had named it, which then waits for the whole transfer",
    "useful": "prefetched, and there when its layer needed it: no wait at all",
    "late": "prefetched, but still on its way then: saves a part of the wait",
    "wasted": "prefetched and evicted before any layer needed it",
    "left at the end": "prefetched and not yet needed when the run ended",
    "break-even": "the recall, the share of the experts needed that are guessed, from which prefetching is no slower "
    "than none",
}


def make(simulations: Sequence[Simulation], name: str = UNNAMED) -> Section:
    """Return the section of simulations, the figures those of the first; without one, how to get it.

    Raises ConfigurationError where one is not what `simulate --json` writes; the sentence calls it `name`.
    """
    if not simulations:
        return Section("prefetching", TITLE, lead="", notices=(NO_SIMULATION,))
    with doubted(name, VERB):
        return _section(simulations)


def _section(simulations: Sequence[Simulation]) -> Section:
    simulation = simulations[0]
    return Section(
        key="prefetching",
        title=TITLE,
        lead=per_cents(" ".join(readable(answer, None) for answer in simulation["answers"])),
        figures=tuple(_figures(simulations)),
        notices=() if simulation["sweep"] else (NO_SWEEP,),
        headline=tuple(_headline(simulation)),
        partial="prefetching.html.j2",
        values={
            "notes": [readable(str(note), None) for note in simulation["notes"]],
            "facts": list(_facts(simulation).items()),
            "prefetchers": [
                (readable(each), traits["horizon"], f"{100 * traits['recall']:.1f}", f"{traits['prediction_us']:.4g}")
                for each, traits in simulation["prefetchers"].items()
            ],
            "words": list(_words(simulation).items()),
        },
        numbers={"simulations": list(simulations)},
    )  # fmt: skip


def _figures(simulations: Sequence[Simulation]) -> list[Figure]:
    simulation = simulations[0]
    swept = [cache_figure(simulation), link_figure(simulation)] if simulation["sweep"] else []
    compared = [machines_figure(simulations)] if len(simulations) > 1 else []
    moves = any(row["totals"]["demanded"] or row["totals"]["prefetched"] for row in simulation["rows"])
    return [speed_figure(simulation), *swept, *([bytes_figure(simulation)] if moves else []), *compared]


def _headline(simulation: Simulation) -> list[tuple[str, str]]:
    """Return what the best predictor buys."""
    row = best_row(simulation, predictor_names(simulation))
    if row is None:
        return []
    hardware = readable(simulation["hardware"]["name"])
    title = f"times as fast by prefetching with {readable(row['prefetcher'])}, simulated on {hardware}"
    return [(title, f"{row['over_caching']['value']:.2f}")]


def _facts(simulation: Simulation) -> dict[str, str]:
    """Return what the run came down to, as name and value."""
    machine, settings, hardware = (simulation[part] for part in ("machine", "settings", "hardware"))
    held, everything, ram = machine["cache_experts"], machine["experts"], machine["ram_experts"]
    layout = "shared by the layers" if machine["cache_layout"] == "pooled" else "equal parts for the layers"
    fetched = f"{settings['budget'] or simulation['model_profile']['top_k']} experts at most"
    if settings["threshold"]:
        fetched += f", of probability {settings['threshold']:g} or more"
    facts = {
        "machine": readable(hardware["name"]),
        "model": f"{readable(simulation['model_profile']['name'])}, {readable(machine['precision'])}",
        "one expert": f"{machine['expert_bytes'] / 1e6:.3g} MB",
        "the GPU holds": per_cents(
            f"{grouped(held)} of {grouped(everything)} experts ({held / everything:.0%}), {layout}"
        ),
        "RAM holds": "all of them" if ram is None else f"{grouped(ram)} of them, the disk the rest",
        "a transfer to the GPU": f"{_ms(machine['transfer_us'])}, at {hardware['link_gb_s']:.3g} GB/s",
    }
    if ram is not None:
        facts["a read from the disk"] = _ms(machine["disk_read_us"])
    return facts | {
        "a layer computes": _ms(machine["layer_us"]),
        "a prediction fetches": fetched,
        "simulated": f"{grouped(simulation['tokens'])} tokens of {grouped(simulation['sequences'])} sequences, split "
        f"{readable(simulation['split'])}, {settings['batch_size']} at once",
    }


def _words(simulation: Simulation) -> dict[str, str]:
    """Return the words of this simulation's figures with what they mean."""
    rows = simulation["rows"]
    used: Mapping[str, Any] = dict.fromkeys([row["prefetcher"] for row in rows] + [row["policy"] for row in rows])
    named = {word: meaning for word, meaning in (PREFETCHERS | POLICIES).items() if word in used}
    return named | FETCHES


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g} ms"
