"""The section on prefetching: every figure against the simulation it shows, its words explained, odd files refused."""

import copy
import html
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from analysis.figures import Figure, Section
from analysis.sections import prefetching
from analysis.sections.prefetching_sweeps import sweeps_figure
from analysis.simulations import checked, spoken
from groundwork.errors import ConfigurationError
from traces.reader import TraceDataset

NAME = "markov@<b>mine"
KEYS = ["prefetching_speed", "prefetching_cache", "prefetching_link", "prefetching_bytes"]
DIGITS = 0.005  # of the largest number in a column, four digits of which are shown


def figures(section: Section) -> dict[str, Figure]:
    for figure in section.figures:
        go.Figure(figure.spec)  # raises on any unknown attribute
        assert figure.rows, figure.key
        assert {len(row) for row in figure.rows} == {len(figure.columns)}, figure.key
        assert NAME not in json.dumps(figure.spec), figure.key  # plotly would read it as markup
    return {figure.key: figure for figure in section.figures}


def column(figure: Figure, name: str) -> list[Any]:
    return [row[figure.columns.index(name)] for row in figure.rows]


def close(shown: list[Any], wanted: list[float]) -> bool:
    return bool(np.allclose(shown, wanted, rtol=0, atol=DIGITS * max(wanted)))


def test_every_row_is_drawn_with_its_interval_and_where_its_time_goes(simulation: dict[str, Any]) -> None:
    section = prefetching.make([simulation])
    made = figures(section)
    assert list(made) == KEYS
    speed, rows = made["prefetching_speed"], simulation["rows"]
    assert [tuple(row[:2]) for row in speed.rows] == [(row["prefetcher"], row["policy"]) for row in rows]
    for shown, end in (("tokens per second", "value"), ("95 % from", "low")):
        assert close(column(speed, shown), [row["tokens_per_s"][end] for row in rows])
    dots = [trace for trace in speed.spec["data"] if trace.get("error_x")]
    assert sum(len(trace["x"]) for trace in dots) == len(rows)
    parts = np.array([trace["x"] for trace in speed.spec["data"] if trace["type"] == "bar"])
    assert np.allclose(parts.sum(axis=0), [1000 / row["tokens_per_s"]["value"] for row in rows])
    all_there = [trace["x"] for trace in speed.spec["data"] if trace["name"] == "all experts on the GPU"]
    assert all_there == [[simulation["machine"]["tokens_per_s_with_all_experts"]] * 2]
    assert section.numbers["simulations"] == [simulation]


def test_the_bytes_of_each_row_are_all_accounted_for(simulation: dict[str, Any]) -> None:
    made, rows = figures(prefetching.make([simulation]))["prefetching_bytes"], simulation["rows"]
    parts = np.array([trace["x"] for trace in made.spec["data"]])
    assert np.allclose(parts.sum(axis=0), [row["bytes_per_token"]["value"] / 1e6 for row in rows])
    for trace, counter in zip(made.spec["data"], ("demanded", "useful", "late", "wasted", "unused"), strict=True):
        scale = simulation["machine"]["expert_bytes"] / 1e6 / simulation["tokens"]
        assert np.allclose(trace["x"], [row["totals"][counter] * scale for row in rows]), counter
    assert column(made, "of them useful, %")[0] is None  # nothing is prefetched without a prefetcher


def test_sweeps_hold_the_speeds_and_the_recall_of_every_point(simulation: dict[str, Any]) -> None:
    made = figures(prefetching.make([simulation]))
    link, machine = simulation["hardware"]["link_gb_s"], simulation["machine"]
    held = 100 * machine["cache_experts"] / machine["experts"]
    for key, points, places, at in (
        ("prefetching_cache", "by_cache", lambda point: 100 * point["share"], held),
        ("prefetching_link", "by_link", lambda point: link * point["link_factor"], link),
    ):
        traces = {trace["name"]: trace for trace in made[key].spec["data"]}
        found = simulation["sweep"][points]
        for name, policy in simulation["sweep"]["policies"].items():
            trace = traces[html.escape(f"{name} ({policy})")]
            assert trace["x"] == [places(point) for point in found]
            assert np.allclose(trace["y"], [point["tokens_per_s"][name] for point in found])
            assert close(column(made[key], f"{name}, tokens/s"), trace["y"])
        assert np.allclose(traces["break-even"]["y"], [100 * point["break_even"]["recall"] for point in found])
        recall = 100 * simulation["prefetchers"][NAME]["recall"]
        assert np.allclose(traces[html.escape(f"recall of {NAME}")]["y"], recall)
        assert traces["set-up simulated"]["x"] == [at, at]
    assert made["prefetching_link"].spec["layout"]["xaxis"]["type"] == "log"


def test_always_and_never_are_said_and_marked_as_such(simulation: dict[str, Any]) -> None:
    changed = copy.deepcopy(simulation)
    points = changed["sweep"]["by_cache"]
    points[0]["break_even"] = {"pays": "never", "recall": None}
    for point in points[1:]:
        point["break_even"] = {"pays": "always", "recall": 0.25}
    made = figures(prefetching.make([changed]))["prefetching_cache"]
    assert column(made, "so it pays") == ["never", *["always"] * (len(points) - 1)]
    assert column(made, "break-even recall, %") == [None, *[25.0] * (len(points) - 1)]
    assert "with 12.5 % held not even perfect ones are faster" in made.sentence
    assert "held even blind guesses are no slower" in made.sentence
    assert f"clears it at {len(points) - 1} of {len(points)} points" in made.sentence
    line = next(trace for trace in made.spec["data"] if trace["name"] == "break-even")
    assert line["marker"]["symbol"] == ["x", *["triangle-down"] * (len(points) - 1)]
    assert line["y"] == [100, *[25] * (len(points) - 1)]


def set_speeds(simulation: dict[str, Any], speeds: list[float]) -> dict[str, Any]:
    """Return the same with a predictor that many times as fast as none at the points of the sweep over caches."""
    changed = copy.deepcopy(simulation)
    for point, speed in zip(changed["sweep"]["by_cache"], speeds, strict=True):
        point["tokens_per_s"] |= {"none": 10.0, NAME: 10 * speed}
        point["break_even"] = {"pays": "above", "recall": 0.2}
    return changed


def test_the_sentence_says_where_a_predictor_gains_harms_or_changes_nothing(simulation: dict[str, Any]) -> None:
    def sentence(speeds: list[float]) -> str:
        return figures(prefetching.make([set_speeds(simulation, speeds)]))["prefetching_cache"].sentence

    harmful = sentence([1.2, 1, 1, 1, 1, 1, 0.9])
    assert f"{NAME} buys most with 12.5 % held, 1.20 times" in harmful
    assert "least with 87.5 % held, 0.90 times: it does harm there" in harmful
    assert "where its own curve above says otherwise" in harmful  # its recall of 0.3 clears 0.2 there too
    gaining = sentence([1.2, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1])
    assert "harm" not in gaining
    assert "otherwise" not in gaining
    assert "is as fast as caching alone at all of them" in sentence([1.0] * 7)


def test_recall_is_not_compared_where_another_number_of_experts_is_fetched(simulation: dict[str, Any]) -> None:
    changed = copy.deepcopy(simulation)
    changed["prefetchers"][NAME]["budget"] = 5
    made = figures(prefetching.make([changed]))["prefetching_cache"]
    assert not [trace["name"] for trace in made.spec["data"] if trace["name"].startswith("recall of")]
    assert "clears it" not in made.sentence


def test_the_answers_lead_and_every_word_of_the_figures_is_explained(simulation: dict[str, Any]) -> None:
    section = prefetching.make([simulation])
    assert section.lead.replace(" %", "%") == " ".join(simulation["answers"])
    explained = dict(section.values["words"])
    for row in simulation["rows"]:
        assert {row["prefetcher"], row["policy"]} - {NAME} <= set(explained)
    assert {"useful", "late", "wasted", "left at the end", "demanded", "break-even"} <= set(explained)
    less = [row for row in simulation["rows"] if row["policy"] == simulation["best_caching"]]
    fewer = dict(prefetching.make([simulation | {"rows": less}]).values["words"])
    assert "belady" not in fewer
    assert section.values["notes"] == simulation["notes"]


def test_several_simulations_are_compared_by_machine(simulation: dict[str, Any]) -> None:
    alone = copy.deepcopy(simulation)
    alone["rows"] = [row for row in simulation["rows"] if row["prefetcher"] != NAME]
    alone["machine"]["cache_experts"] = 6
    del alone["prefetchers"][NAME], alone["sweep"]
    section = prefetching.make([simulation, simulation, alone | {"sweep": None}])
    made = figures(section)
    assert list(made) == [*KEYS, "prefetching_machines"]
    compared = made["prefetching_machines"]
    machines = column(compared, "machine")
    assert [name.rsplit(", ", 1)[1] for name in machines] == ["50 %", "50 % (2)", "25 %"]
    real = [row["tokens_per_s"]["value"] for row in simulation["rows"] if row["prefetcher"] == NAME][:2]  # no belady
    best = next(trace for trace in compared.spec["data"] if trace["name"] == "best predictor")
    assert np.allclose(best["x"], [max(real)] * 2, atol=0.001)
    assert column(compared, "times as fast")[2] is None
    assert len(section.numbers["simulations"]) == 3


def test_without_a_sweep_or_a_simulation_the_section_says_how_to_get_one(simulation: dict[str, Any]) -> None:
    section = prefetching.make([simulation | {"sweep": None}])
    assert list(figures(section)) == ["prefetching_speed", "prefetching_bytes"]
    assert "--sweep_tokens" in section.notices[0].commands[0]
    section = prefetching.make([])
    assert not section.figures
    assert ["simulate" in command for command in section.notices[0].commands] == [True, False]
    assert "report --shard_dir RUN --simulation" in section.notices[0].commands[1]


def test_where_everything_fits_nothing_is_said_to_wait_and_no_bytes_are_drawn(simulation: dict[str, Any]) -> None:
    fits = copy.deepcopy(simulation)
    for row in fits["rows"]:
        row["totals"] |= {"waiting_ns": 0, "demanded": 0, "prefetched": 0}
        row["useful_share"] = row["late_share"] = None
    for point in fits["sweep"]["by_link"]:
        point["break_even"] = {"pays": "never", "recall": None}
    made = figures(prefetching.make([fits]))
    assert list(made) == KEYS[:-1]
    assert "Nothing waits here" in made["prefetching_speed"].sentence
    assert "everywhere not even perfect ones are faster" in made["prefetching_link"].sentence


def test_without_a_predictor_perfect_guesses_are_what_the_sentences_name(simulation: dict[str, Any]) -> None:
    changed = copy.deepcopy(simulation)
    changed["rows"] = [row for row in changed["rows"] if row["prefetcher"] != NAME]
    del changed["prefetchers"][NAME], changed["sweep"]["policies"][NAME]
    section = prefetching.make([changed])
    made = figures(section)
    assert "perfect buys most" in made["prefetching_cache"].sentence
    assert "prefetches of perfect" in made["prefetching_bytes"].sentence
    assert not section.headline


def without(part: str) -> Callable[[dict[str, Any]], Any]:
    return lambda simulation: {key: value for key, value in simulation.items() if key != part}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((without(part), "is not what 'expert-speculation simulate --json' writes")
          for part in ("rows", "machine", "hardware", "model_profile", "answers", "prefetchers", "sweep",
                       "best_caching")),
        (lambda simulation: [simulation], "is not what 'expert-speculation simulate --json' writes"),
        (lambda simulation: simulation | {"rows": []}, "is not what"),
        (lambda simulation: simulation | {"tokens": float("nan")}, "is not what .* JSON compliant"),
        (lambda simulation: simulation | {"answers": [7]}, "is not what"),
        (lambda simulation: simulation | {"format_version": 2}, "has format_version 2, but 1 is needed here"),
        (lambda simulation: simulation | {"model_profile": simulation["model_profile"] | {"num_experts": 64}},
         "has num_experts 64, but 8 is needed here; simulate with traces of the same model"),
    ],
)  # fmt: skip
def test_what_is_no_simulation_of_this_model_is_refused_by_its_name(
    dataset: TraceDataset, simulation: dict[str, Any], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^--simulation s.json {message}"):
        prefetching.make(checked([change(simulation)], dataset.spec, ["--simulation s.json"]), "--simulation s.json")


def test_a_picture_holds_both_sweeps_beside_each_other(simulation: dict[str, Any]) -> None:
    spec = sweeps_figure(simulation).spec
    layout = go.Figure(spec).layout
    assert layout.xaxis.domain[1] < layout.xaxis2.domain[0]
    assert (layout.xaxis.title.text, layout.xaxis2.title.text) == (
        "experts that the GPU holds, of all",
        "speed of the link, GB/s",
    )
    named = [trace["name"] for trace in spec["data"] if trace.get("showlegend", True)]
    assert len(named) == len(set(named))


def test_numbers_are_spoken_with_three_digits() -> None:
    assert [spoken(value) for value in (0, 0.01234, 9.876, 45.67, 1329.2)] == [
        *("0", "0.0123", "9.88", "45.7", "1\N{NARROW NO-BREAK SPACE}329")
    ]
