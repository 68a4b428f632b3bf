"""Measuring: little work on this machine gives a profile with its own numbers; what can not be measured is refused."""

import time
from pathlib import Path

import pytest
import torch

from groundwork.errors import ConfigurationError
from groundwork.profiles.device_speed import layer_overhead, link_speed, matmul_rate, memory_bandwidth
from groundwork.profiles.disk_speed import disk_speed
from groundwork.profiles.loading import hardware_profile, profile_toml
from groundwork.profiles.measure import Effort, measure_hardware

LITTLE = Effort(2**22, matmul_width=64, layers=2, link_bytes=2**22, disk_bytes=2**22, repetitions=3)
CPU = torch.device("cpu")
DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.fixture
def disk() -> Path:
    """A folder beside this file's results: /tmp, where pytest writes, may be memory."""
    folder = Path(__file__).resolve().parents[3] / ".pytest_cache"
    folder.mkdir(exist_ok=True)
    try:
        disk_speed(folder, 2**20, passes=1)
    except ConfigurationError as error:
        if "only memory can" not in str(error):
            raise
        pytest.skip("the checkout is kept in memory here")
    return folder


@pytest.mark.parametrize("device", DEVICES)
def test_this_machine_gets_a_profile_that_a_file_keeps(device, disk, tmp_path, capsys):
    before = set(disk.iterdir())
    profile = measure_hardware(disk, device, LITTLE)
    assert set(disk.iterdir()) == before
    file = tmp_path / "mine.toml"
    file.write_text(profile_toml(profile))
    assert hardware_profile(file) == profile
    assert ("There is no GPU" in profile.source) == (device == "cpu")
    assert 0 < profile.reserved_gb <= 2
    assert str(disk) in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_more_work_takes_longer_and_rates_stay_in_their_order(device):
    chosen = torch.device(device, 0) if device == "cuda" else CPU
    size = 2**24
    rate = memory_bandwidth(chosen, size, repetitions=5)
    started = time.perf_counter()
    torch.mv(torch.ones(size // 4 // 4096, 4096), torch.ones(4096))  # allocated and filled anew: slower than reading
    assert rate > 0.1 * size / (time.perf_counter() - started)
    assert matmul_rate(chosen, 256, 5) > matmul_rate(chosen, 16, 5)  # small products are all overhead
    assert 1e-6 < layer_overhead(chosen, layers=5, repetitions=3) < 1
    link = link_speed(chosen, 2**24, repetitions=5)
    assert link.bytes_per_s > 1e8
    assert 0 < link.latency_s < 0.01


def test_a_disk_is_slower_for_small_reads_than_memory(disk):
    speed = disk_speed(disk, 2**24, passes=1)
    assert speed.bytes_per_s > 1e6
    assert speed.latency_s >= 5e-6


def test_a_folder_in_memory_is_refused():
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system in memory here")
    with pytest.raises(ConfigurationError, match=r"/dev/shm: small reads take .* us, which only memory can"):
        disk_speed(Path("/dev/shm"), 2**22, passes=1)


def test_a_folder_without_space_is_refused():
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(ConfigurationError, match="/proc: 0 MB are free, too few to measure with"):
        disk_speed(Path("/proc"))


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="not a folder; name one on the disk"):
        disk_speed(tmp_path / "absent")


def test_a_device_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--device cuda:99"):
        measure_hardware(tmp_path, "cuda:99", LITTLE)
