"""How long things take: against sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest

from groundwork.errors import ConfigurationError
from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.loading import hardware_profile, model_profile
from prefetch.timing import Timing

ROUND = HardwareProfile(
    name="round numbers",
    source="",
    gpu_memory_gb=24,
    memory_gb_s=1000,
    compute_tflops=100,
    layer_overhead_us=50,
    link_gb_s=20,
    link_latency_us=15,
    disk_gb_s=4,
    disk_latency_us=80,
    ram_gb=64,
    reserved_gb=1,
)
MIXTRAL = model_profile("mixtral-8x7b")


def test_a_single_token_takes_as_long_as_its_bytes_take_to_read() -> None:
    timing = Timing.of(MIXTRAL, ROUND, "bf16", batch_size=1)
    assert timing.expert_bytes == 352_321_536
    assert timing.transfer_ns == 15_000 + 17_616_077  # at 20 bytes a ns
    assert timing.read_ns == 80_000 + 88_080_384  # at 4
    assert timing.attention_ns_A[1] == 50_000 + 83_968  # two bytes of each of 41,984,000 parameters, 1000 a ns
    assert timing.other_ns_A[1] == 262_152  # 131,076,096 parameters: the head, not the embeddings
    assert timing.experts_ns_AE[1].tolist()[1:4] == [352_322, 704_643, 1_056_965]
    assert timing.resident_ns(32, 2) == 32 * (133_968 + 704_643) + 262_152


def test_many_tokens_at_once_take_as_long_as_their_multiplications() -> None:
    timing = Timing.of(MIXTRAL, ROUND, "bf16", batch_size=1000)
    # 2 * 41,984,000 * A operations at 100,000 a ns take longer than reading from A = 100 on
    assert timing.attention_ns_A[[99, 100, 101, 1000]].tolist() == [133_968, 133_968, 134_808, 889_680]
    # two experts of 176,160,768 parameters a token: as long as reading all eight from A = 400 on
    reading_all, computing = 2_818_572, 7_046_431
    assert timing.experts_ns_AE[[400, 1000], 8].tolist() == [reading_all, computing]
    assert (timing.experts_ns_AE[1000] == computing).all()
    assert timing.other_ns_A[1000] == 2_621_522


def test_a_smaller_precision_moves_and_reads_fewer_bytes() -> None:
    timing = Timing.of(MIXTRAL, ROUND, "nf4", batch_size=1)
    assert timing.expert_bytes == 99_090_432
    assert timing.transfer_ns == 15_000 + 4_954_522
    assert timing.experts_ns_AE[1, 2] == 198_181
    default = Timing.of(MIXTRAL, ROUND, None, batch_size=1)
    assert default.expert_bytes == MIXTRAL.expert_bytes("bf16")
    with pytest.raises(ConfigurationError, match=r"precision 'int3' is not in it; use one of bf16"):
        Timing.of(MIXTRAL, ROUND, "int3", batch_size=1)


def test_times_never_fall_with_more_sequences_or_more_experts() -> None:
    timing = Timing.of(MIXTRAL, hardware_profile("laptop"), None, batch_size=300)
    for times in (timing.attention_ns_A, timing.other_ns_A, timing.experts_ns_AE, timing.experts_ns_AE.T):
        assert (np.diff(times, axis=0) >= 0).all()
        assert times.dtype == np.int64


def test_a_packaged_machine_decodes_gpt_oss_as_fast_as_its_source_measured() -> None:
    model, measured = model_profile("gpt-oss-20b"), 286  # tokens/s by llama.cpp, source of h100's layer_overhead_us
    beside_experts = 24 * model.layer_parameters + model.other_parameters
    as_in_the_file = (11.6e9 - 24 * 32 * model.expert_bytes("mxfp4")) / beside_experts  # bytes per parameter
    model = replace(model, resident_bytes_per_parameter=as_in_the_file)
    timing = Timing.of(model, hardware_profile("h100"), "mxfp4", batch_size=1)
    assert 1e9 / timing.resident_ns(24, 4) == pytest.approx(measured, rel=0.01)


def test_a_link_of_another_speed_changes_transfers_alone() -> None:
    timing = Timing.of(MIXTRAL, ROUND, "bf16", batch_size=2)
    assert timing.with_link(4).transfer_ns == 4_407_769  # of 17,631,077
    assert timing.with_link(0.5).transfer_ns == 35_262_154
    assert timing.with_link(float("inf")).transfer_ns == 0
    assert timing.with_link(4).read_ns == timing.read_ns
    assert timing.with_link(4).resident_ns(32, 2) == timing.resident_ns(32, 2)


def test_nothing_that_moves_takes_no_time() -> None:
    instant = replace(ROUND, link_latency_us=0.0, disk_latency_us=0.0, link_gb_s=1e9, disk_gb_s=1e9)
    tiny = replace(MIXTRAL, expert_parameters=1)
    timing = Timing.of(tiny, instant, "bf16", batch_size=1)
    assert (timing.transfer_ns, timing.read_ns) == (1, 1)
