"""The arithmetic of resident and streamed tracing, by hand."""

import pytest

from groundwork.profiles.execution import Rates, resident_seconds, streamed_seconds

RATES = Rates(disk_bytes_per_s=100.0, ready_s_per_byte=0.01, token_layer_s=0.001)  # 0.02 s a byte, 0.01 if cached


def test_a_resident_run_loads_once_and_computes():
    assert resident_seconds(500, tokens=2000, layers=4, rates=RATES) == (pytest.approx(10), pytest.approx(8))


def test_where_computing_is_longer_only_the_first_layer_of_a_pass_is_waited_for():
    start, passes = streamed_seconds(100, [50, 50, 50], [4000, 4000], RATES, cached=False)
    assert start == pytest.approx(2 + 3)
    assert passes == pytest.approx(2 * (1 + 3 * 4))


def test_where_reading_is_longer_only_the_last_layer_is_computed_in_time_of_its_own():
    _, passes = streamed_seconds(0, [50, 60, 70], [100], RATES, cached=False)
    assert passes == pytest.approx(1 + 1.2 + 1.4 + 0.1)


def test_what_the_page_cache_holds_is_read_from_the_disk_at_the_start_alone():
    start, passes = streamed_seconds(0, [50, 50], [100], RATES, cached=True)
    assert (start, passes) == (pytest.approx(2), pytest.approx(0.5 + 0.5 + 0.1))


def test_layers_behind_the_last_traced_one_are_read_at_the_start_alone():
    start, passes = streamed_seconds(0, [50, 50, 1000], [100], RATES, cached=False, traced=2)
    assert (start, passes) == (pytest.approx(22), pytest.approx(1 + 1 + 0.1))
