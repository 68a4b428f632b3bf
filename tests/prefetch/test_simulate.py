"""The whole answer on tiny traces: complete, fit for JSON, and honest about what it lacks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundwork.errors import ConfigurationError
from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.model import ModelProfile
from prefetch.guesses import perfect_guesses
from prefetch.settings import SimulateSettings
from prefetch.simulate import format_result, simulate
from prefetch.simulation import Prefetcher, Simulation, usage_rates
from prefetch.timing import Timing
from prefetch.workload import read_workload
from speculation import Predictor, create
from speculation.counted import BASELINES_FILE, count_routing
from traces.reader import TraceDataset

TINY = ModelProfile(
    name="tiny", source="", moe_layers=4, num_experts=8, top_k=2, expert_parameters=1_000_000,
    layer_parameters=500_000, other_parameters=2_000_000, embedding_parameters=1_000_000,
    precisions={"bf16": 2.0, "int4": 0.5}, default_precision="bf16",
)  # fmt: skip
SMALL = HardwareProfile(
    name="small",
    source="",
    gpu_memory_gb=0.0331,  # 8 MB of other weights, 5 MB reserved and ten experts of 2 MB
    memory_gb_s=100,
    compute_tflops=1,
    layer_overhead_us=40,
    link_gb_s=20,
    link_latency_us=10,
    disk_gb_s=2,
    disk_latency_us=100,
    ram_gb=1,
    reserved_gb=0.005,
)
QUICK = SimulateSettings(bootstrap=50, sweep_tokens=0)
FREE = replace(QUICK, prediction_us="0")

Simulated = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def predictors(dataset: TraceDataset) -> dict[str, Predictor]:
    return {name: create(name).fit(dataset) for name in ("markov", "frequency")}


@pytest.fixture(scope="module")
def result(dataset: TraceDataset, predictors: dict[str, Predictor]) -> dict[str, Any]:
    return simulate(dataset, predictors, TINY, SMALL, replace(FREE, sweep_tokens=40, prediction_us="5"))


def rows_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["prefetcher"], row["policy"]): row for row in result["rows"]}


def test_the_result_has_the_documented_keys_and_is_json(result: dict[str, Any], dataset: TraceDataset) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)).keys() == result.keys()
    assert list(result) == [
        "format_version", "model", "split", "only_dataset", "sequences", "tokens", "settings", "hardware",
        "model_profile", "machine", "prefetchers", "rows", "best_caching", "answers", "what_else", "sweep", "notes",
    ]  # fmt: skip
    test = [info for info in dataset.index if info.split == "test"]
    assert (result["sequences"], result["tokens"]) == (len(test), sum(info.num_tokens for info in test))
    assert (result["format_version"], result["model"], result["split"]) == (1, "tiny", "test")
    assert result["hardware"]["link_gb_s"] == 20
    assert result["model_profile"]["num_experts"] == 8
    assert result["settings"]["prediction_us"] == "5"
    for row in result["rows"]:
        assert set(row) == {
            "prefetcher", "policy", "tokens_per_s", "waiting_ms_per_token", "hit_rate", "useful_share", "late_share",
            "bytes_per_token", "totals", "over_caching",
        }  # fmt: skip


def test_the_machine_is_what_model_and_hardware_come_to(result: dict[str, Any]) -> None:
    machine = dict(result["machine"])
    layer_us, other_us = machine.pop("layer_us"), machine.pop("other_us_per_token")
    assert layer_us == 40 + 10 + 2 * 20  # attention reads 1 MB and an expert is 2 MB, at 0.1 MB a us
    assert other_us == 20
    assert machine.pop("tokens_per_s_with_all_experts") == pytest.approx(1e6 / (4 * 90 + 20))
    assert machine == {
        "precision": "bf16",
        "expert_bytes": 2_000_000,
        "experts": 32,
        "cache_experts": 10,
        "cache_layout": "pooled",
        "ram_experts": None,
        "transfer_us": 110,
        "disk_read_us": 1100,
    }


def test_every_prefetcher_meets_the_best_caching_and_the_best_eviction(result: dict[str, Any]) -> None:
    rows = rows_of(result)
    best = result["best_caching"]
    assert best in ("lru", "lfu", "lfu_aged", "static")
    alone = {policy for prefetcher, policy in rows if prefetcher == "none"}
    assert alone == {"lru", "lfu", "lfu_aged", "static", "guided", "belady"}
    for name in ("markov", "frequency", "perfect", "oracle"):
        assert {policy for prefetcher, policy in rows if prefetcher == name} == {best, "guided", "belady"}
    assert len(rows) == len(result["rows"])
    assert rows["none", best]["over_caching"] == {"value": 1, "low": 1, "high": 1}
    speeds = {key: row["tokens_per_s"]["value"] for key, row in rows.items()}
    assert speeds["none", best] == max(speeds["none", policy] for policy in alone - {"guided", "belady"})
    assert speeds["none", best] < speeds["markov", best] < speeds["perfect", best]
    assert max(speeds.values()) < result["machine"]["tokens_per_s_with_all_experts"]


def test_prefetchers_say_what_they_are(result: dict[str, Any]) -> None:
    markov = result["prefetchers"]["markov"]
    assert (markov["horizon"], markov["budget"], markov["prediction_us"]) == (1, 2, 5)
    assert 0.5 < markov["recall"] < 1
    assert result["prefetchers"]["frequency"]["recall"] < markov["recall"]
    assert result["prefetchers"]["perfect"] == {"horizon": 1, "budget": 2, "recall": 1, "prediction_us": 0}
    assert result["prefetchers"]["oracle"] == {"horizon": 4, "budget": 2, "recall": 1, "prediction_us": 0}


def test_perfect_guesses_are_perfect_whatever_the_budget_of_a_predictor(
    dataset: TraceDataset, predictors: dict[str, Predictor]
) -> None:
    found = simulate(dataset, predictors, TINY, SMALL, replace(FREE, budget=1))["prefetchers"]
    assert found["perfect"] == {"horizon": 1, "budget": 2, "recall": 1, "prediction_us": 0}
    assert found["markov"]["budget"] == 1
    assert found["markov"]["recall"] <= 0.5


def test_three_sentences_answer_and_name_the_best_predictor(result: dict[str, Any]) -> None:
    limits, predictor, more = result["answers"]
    assert f"with the best caching ({result['best_caching']}) and no prefetching" in limits
    assert f"Prefetching with markov (recall {result['prefetchers']['markov']['recall']:.3f}, " in predictor
    rows = [row for (name, policy), row in rows_of(result).items() if name == "markov" and policy != "belady"]
    best = max(row["over_caching"]["value"] for row in rows)
    assert f"is {best:.3f} times [" in predictor
    assert more.startswith("What would add to prefetching with markov, in times its tokens per second: ")
    assert {"predictions 2 layers ahead", "predictions 3 layers ahead", "predictions that take no time"} < {
        each["what"] for each in result["what_else"]
    }
    assert [each["times_as_fast"] for each in result["what_else"]] == sorted(
        (each["times_as_fast"] for each in result["what_else"]), reverse=True
    )


def test_the_sweep_is_of_some_sequences_with_the_best_of_each(result: dict[str, Any]) -> None:
    sweep = result["sweep"]
    assert 0 < sweep["tokens"] <= 40 < result["tokens"]
    assert set(sweep["policies"]) == {"none", "markov", "perfect", "oracle"}
    assert sweep["policies"]["none"] == result["best_caching"]
    assert "belady" not in sweep["policies"].values()
    assert sweep["break_even_policy"] == sweep["policies"]["markov"]
    assert 10 in [point["cache_experts"] for point in sweep["by_cache"]]


def test_guesses_of_a_swept_part_are_those_of_its_own_tokens(result: dict[str, Any], dataset: TraceDataset) -> None:
    whole = read_workload(dataset, "test")
    part, _ = whole.of(whole.part(40, seed=0))
    rate_LE = usage_rates(count_routing(dataset).usage_LE.numpy(), 2)
    simulation = Simulation(part, Timing.of(TINY, SMALL, None, 1), 10, rate_LE)
    perfect = Prefetcher(perfect_guesses(part), 1, 2)
    (here,) = (point for point in result["sweep"]["by_cache"] if point["cache_experts"] == 10)
    policies = result["sweep"]["policies"]
    assert here["tokens_per_s"]["none"] == simulation.run(policies["none"]).tokens_per_s
    assert here["tokens_per_s"]["perfect"] == simulation.run(policies["perfect"], perfect).tokens_per_s


def test_the_text_shows_machine_table_answers_and_notes(result: dict[str, Any]) -> None:
    text = format_result({**result, "notes": ["by the way"]})
    lines = text.splitlines()
    assert lines[0] == (
        "tiny, bf16 (2.0 MB an expert), on small: the GPU holds 10 of 32 experts; a transfer takes 110 us, a layer "
        "computes 90 us for a token"
    )
    assert lines[2].startswith("prefetcher  policy")
    for sentence in result["answers"]:
        assert sentence in lines
    assert lines[-2].endswith(
        "1 at once, predictions 1 ahead (markov in 5 us, frequency in 5 us); the last column compares with caching "
        f"alone ({result['best_caching']})"
    )
    assert lines[-1] == "note: by the way"
    disk = format_result({**result, "machine": {**result["machine"], "ram_experts": 20}})
    assert "the GPU holds 10 of 32 experts, RAM 20, the disk the rest; " in disk


def test_the_same_inputs_give_the_same_result(
    result: dict[str, Any], dataset: TraceDataset, predictors: dict[str, Predictor]
) -> None:
    again = simulate(dataset, predictors, TINY, SMALL, replace(FREE, sweep_tokens=40, prediction_us="5"))
    assert json.dumps(again) == json.dumps(result)


def test_horizons_that_the_traces_can_not_serve_are_not_tried(make_traces: Callable[..., TraceDataset]) -> None:
    traces = make_traces(horizons=1)
    found = simulate(traces, {"gate_lookahead": create("gate_lookahead").fit(traces)}, TINY, SMALL, FREE)
    assert found["prefetchers"]["gate_lookahead"]["horizon"] == 1
    tried = [each["what"] for each in found["what_else"] if each["what"].startswith("predictions ")]
    assert tried == []
    farther = simulate(traces, {"repeat": create("repeat").fit(traces)}, TINY, SMALL, FREE)["what_else"]
    assert {"predictions 2 layers ahead", "predictions 3 layers ahead"} <= {each["what"] for each in farther}


def test_without_a_predictor_caching_and_foresight_remain(dataset: TraceDataset) -> None:
    found = simulate(dataset, {}, TINY, SMALL, replace(QUICK, sweep_tokens=40))
    assert {row["prefetcher"] for row in found["rows"]} == {"none", "perfect", "oracle"}
    assert {row["prefetcher"] for row in found["rows"] if row["policy"] == "guided"} == {"perfect", "oracle"}
    assert found["answers"][1].startswith("No predictor was given; perfect predictions as far ahead would be ")
    assert set(found["sweep"]["policies"]) == {"none", "perfect", "oracle"}
    assert found["sweep"]["break_even_policy"] == found["sweep"]["policies"]["perfect"]


@pytest.mark.parametrize("policies", [("guided",), ("belady",), ("lru", "static")])
def test_policies_that_are_named_are_those_of_every_prefetcher(
    policies: tuple[str, ...], dataset: TraceDataset, predictors: dict[str, Predictor]
) -> None:
    settings = replace(FREE, policies=policies, sweep_tokens=40)
    found = simulate(dataset, {"markov": predictors["markov"]}, TINY, SMALL, settings)
    assert list(rows_of(found)) == [
        (name, policy) for name in ("none", "markov", "perfect", "oracle") for policy in policies
    ]
    assert found["best_caching"] in policies
    (none,) = (row for row in found["rows"] if (row["prefetcher"], row["policy"]) == ("none", found["best_caching"]))
    everyone = replace(settings, sweep_tokens=10**6)
    whole = simulate(dataset, {"markov": predictors["markov"]}, TINY, SMALL, everyone)["sweep"]
    (here,) = (point for point in whole["by_cache"] if point["cache_experts"] == 10)
    assert here["tokens_per_s"]["none"] == none["tokens_per_s"]["value"]


def test_room_for_every_expert_leaves_nothing_to_prefetch(
    dataset: TraceDataset, predictors: dict[str, Predictor]
) -> None:
    found = simulate(dataset, predictors, TINY, replace(SMALL, gpu_memory_gb=1), replace(FREE, sweep_tokens=40))
    assert found["machine"]["cache_experts"] == 32
    speed = found["machine"]["tokens_per_s_with_all_experts"]
    for row in found["rows"]:
        assert row["tokens_per_s"]["value"] == pytest.approx(speed)
        assert row["bytes_per_token"]["value"] == 0
    assert found["answers"][0].startswith("Nothing is fetched while decoding, because the GPU holds 100% of the exp")
    assert found["answers"][1] == "So there is nothing to prefetch, and no predictor can change anything."
    assert json.dumps(found, allow_nan=False)


def test_cache_and_ram_can_be_shares(dataset: TraceDataset) -> None:
    settings = replace(QUICK, cache_experts="25%", ram_experts="50%", cache_layout="per_layer", precision="int4")
    found = simulate(dataset, {}, TINY, SMALL, settings)
    machine = found["machine"]
    assert (machine["cache_experts"], machine["ram_experts"], machine["cache_layout"]) == (8, 16, "per_layer")
    assert (machine["precision"], machine["expert_bytes"]) == ("int4", 500_000)
    assert all(row["totals"]["disk_reads"] > 0 for row in found["rows"])
    full = simulate(dataset, {}, TINY, SMALL, replace(settings, ram_experts="100%"))
    assert full["machine"]["ram_experts"] is None
    assert all(row["totals"]["disk_reads"] == 0 for row in full["rows"])


def test_experts_may_take_three_quarters_of_ram(dataset: TraceDataset) -> None:
    found = simulate(dataset, {}, TINY, replace(SMALL, ram_gb=0.05), QUICK)
    assert found["machine"]["ram_experts"] == 18  # 37.5 MB of 50


def test_more_places_than_sequences_are_as_many_as_there_are(dataset: TraceDataset) -> None:
    large = replace(QUICK, cache_experts="100%", batch_size=10**10)
    found = simulate(dataset, {}, TINY, SMALL, large)
    exact = simulate(dataset, {}, TINY, SMALL, replace(large, batch_size=found["sequences"]))
    assert found["rows"] == exact["rows"]


def test_only_the_data_sets_named_are_decoded(dataset: TraceDataset, predictors: dict[str, Predictor]) -> None:
    found = simulate(dataset, predictors, TINY, SMALL, FREE, only=["code"])
    code = [info for info in dataset.index if info.split == "test" and info.dataset == "code"]
    assert (found["only_dataset"], found["sequences"]) == (["code"], len(code))
    assert found["tokens"] == sum(info.num_tokens for info in code)


def test_tokens_of_prompts_are_noted(make_traces: Callable[..., TraceDataset], result: dict[str, Any]) -> None:
    prompts = make_traces(decoded=False)
    note = "these traces hold prompts; their tokens are simulated as if they had been decoded one by one"
    assert note in simulate(prompts, {}, TINY, SMALL, QUICK)["notes"]
    assert result["notes"] == []


def test_a_cache_whose_uses_are_unknown_starts_empty_and_says_so(
    dataset: TraceDataset, predictors: dict[str, Predictor]
) -> None:
    found = simulate(dataset, {}, TINY, SMALL, replace(QUICK, split="all"))
    assert {row["policy"] for row in found["rows"]} == {"lru", "lfu", "lfu_aged", "guided", "belady"}
    assert found["notes"] == [
        "which experts are used most is not known without the sequences simulated, so the cache starts empty and "
        "policy static is left out; a predictor folder with counts would tell"
    ]
    with pytest.raises(ConfigurationError, match="--policy static: keeps the experts used most in training, but "):
        simulate(dataset, {}, TINY, SMALL, replace(QUICK, split="all", policies=("static",)))


def test_a_predictor_s_folder_knows_which_experts_are_used_most(dataset: TraceDataset, tmp_path: Path) -> None:
    create("markov").fit(dataset).save_pretrained(tmp_path)
    count_routing(dataset).save(tmp_path / BASELINES_FILE)
    markov = Predictor.from_pretrained(tmp_path)
    found = simulate(dataset, {"markov": markov}, TINY, SMALL, replace(FREE, split="all"))
    assert "static" in {row["policy"] for row in found["rows"]}
    assert found["notes"] == [
        "the cache starts with the experts used most where a predictor given was trained, not in the whole train split",
        "split all holds sequences that a predictor given may have been trained on",
    ]


def test_a_faster_link_and_a_farther_horizon_are_felt(dataset: TraceDataset) -> None:
    here = simulate(dataset, {}, TINY, SMALL, QUICK)
    faster = simulate(dataset, {}, TINY, replace(SMALL, link_gb_s=40), QUICK)
    assert faster["machine"]["transfer_us"] == 60
    speeds = [rows_of(found)["none", "lru"]["tokens_per_s"]["value"] for found in (here, faster)]
    assert speeds[1] > speeds[0]
    assert simulate(dataset, {}, TINY, SMALL, replace(QUICK, horizon=3))["prefetchers"]["perfect"]["horizon"] == 3
    assert np.isfinite(speeds).all()
