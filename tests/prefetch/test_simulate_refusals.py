"""What can not be simulated is refused in one sentence that names the option and the remedy."""

import re
from dataclasses import replace

import pytest

from groundwork.errors import ConfigurationError
from groundwork.profiles.loading import hardware_profile
from groundwork.profiles.model import ModelProfile
from prefetch.settings import SimulateSettings
from prefetch.simulate import simulate
from speculation import create
from traces.reader import TraceDataset

TINY = ModelProfile(
    name="tiny", source="", moe_layers=4, num_experts=8, top_k=2, expert_parameters=1_000_000,
    layer_parameters=500_000, other_parameters=2_000_000, embedding_parameters=1_000_000,
    precisions={"bf16": 2.0, "int4": 0.5}, default_precision="bf16",
)  # fmt: skip
LAPTOP = hardware_profile("laptop")
DEFAULT = SimulateSettings(bootstrap=20, sweep_tokens=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 4}, r"--horizon 4: must be 1 to 3 for these traces"),
        ({"budget": 9}, r"--budget 9: a layer has 8 experts; give at most that"),
        ({"policies": ("guided",)}, r"--policy guided: evicts by a predictor's scores; name one with --predictor_dir"),
        ({"precision": "fp8"}, r"model profile 'tiny': precision 'fp8' is not in it; use one of bf16, int4"),
        ({"split": "unseen"}, r"--split unseen: unknown; choose one of train, validation"),
        ({"cache_experts": "33"}, r"--cache_experts 33: give a whole number of experts, 1 to 32, or a share of them"),
        ({"cache_experts": "1"}, r"--cache_experts 1: one layer of this workload runs up to 2 experts at once; give"),
        ({"ram_experts": "200%"}, r"--ram_experts 200%: give a whole number of experts, 1 to 32"),
        ({"ram_experts": "2"}, r"--ram_experts 2: RAM has to hold the experts that a layer waits for; give at least 4"),
    ],
)
def test_settings_that_do_not_fit_the_traces_are_refused(
    change: dict[str, object], message: str, dataset: TraceDataset
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        simulate(dataset, {}, TINY, LAPTOP, replace(DEFAULT, **change))


def test_a_profile_of_another_model_is_refused(dataset: TraceDataset) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"model profile 'tiny' has \(layers, experts, top k\) \(4, 16, 2\), but the traces of tiny have "
        r"\(4, 8, 2\); name the profile of their model with --model_profile",
    ):
        simulate(dataset, {}, replace(TINY, num_experts=16), LAPTOP, DEFAULT)


def test_a_predictor_of_another_model_or_without_its_columns_is_refused(dataset: TraceDataset) -> None:
    other = create("markov").fit(dataset)
    other.shape_ = replace(other.shape_, num_experts=16)
    with pytest.raises(ConfigurationError, match="markov: traces of 4 layers, top 2 of 8 experts, but predictor mark"):
        simulate(dataset, {"markov": other}, TINY, LAPTOP, DEFAULT)
    with pytest.raises(ConfigurationError, match="gate_lookahead requires the column 'lookahead', which these traces "):
        simulate(dataset, {"gate_lookahead": create("gate_lookahead")}, TINY, LAPTOP, DEFAULT)


def test_a_gpu_without_room_for_experts_is_refused_unless_it_is_to_be_simulated(dataset: TraceDataset) -> None:
    full = replace(LAPTOP, gpu_memory_gb=0.014, reserved_gb=0.005)
    with pytest.raises(
        ConfigurationError,
        match=rf"tiny on {re.escape(LAPTOP.name)}: beside 0\.0 GB of other weights and 0\.005 GB reserved there is "
        r"no room for experts in 0\.014 GB; choose another --hardware or a smaller model, or set --cache_experts",
    ):
        simulate(dataset, {}, TINY, full, DEFAULT)
    assert simulate(dataset, {}, TINY, full, replace(DEFAULT, cache_experts="8"))["machine"]["cache_experts"] == 8
