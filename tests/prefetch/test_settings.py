"""Options that can not be meant are refused when the settings are made."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from prefetch.settings import SimulateSettings, experts_counted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "--horizon 0: must be at least 1; give a larger number"),
        ({"budget": 0}, "--budget 0: must be at least 1"),
        ({"batch_size": -2}, "--batch_size -2: must be at least 1"),
        ({"bootstrap": 0}, "--bootstrap 0: must be at least 1"),
        ({"sweep_tokens": -1}, "--sweep_tokens -1: must not be negative; 0 leaves the sweep out"),
        ({"seed": -1}, "--seed -1: must not be negative; give 0 or more"),
        ({"threshold": 1.5}, "--threshold 1.5: is a probability; give a number from 0 to 1"),
        ({"threshold": float("nan")}, "--threshold nan: is a probability"),
        ({"policies": ("lru", "fifo")}, "--policy fifo: unknown; choose among lru, lfu, lfu_aged, static, guided, bel"),
        ({"cache_layout": "shared"}, "--cache_layout shared: unknown; use pooled or per_layer"),
        (
            {"prediction_us": "fast"},
            "--prediction_us fast: give microseconds per prediction, 0 to 1,000,000,000, or .measure.",
        ),
        ({"prediction_us": "-1"}, "--prediction_us -1: give microseconds"),
        ({"prediction_us": "nan"}, "--prediction_us nan: give microseconds"),
        ({"prediction_us": "inf"}, "--prediction_us inf: give microseconds"),
        ({"prediction_us": "1e300"}, "--prediction_us 1e300: give microseconds"),
    ],
)
def test_a_value_that_can_not_be_meant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SimulateSettings(**change)


@pytest.mark.parametrize(
    ("given_", "ns"), [(None, None), ("measure", None), ("0", 0), ("12.5", 12_500), ("1e3", 10**6)]
)
def test_a_cost_of_prediction_is_in_microseconds(given_: str | None, ns: int | None) -> None:
    assert SimulateSettings(prediction_us=given_).prediction_ns() == ns


@pytest.mark.parametrize(
    ("value", "number"),
    [("1", 1), ("96", 96), ("25%", 24), ("100%", 96), ("33.4%", 32), ("12.0", 12), ("3.9GB", 3), ("500GB", 96)],
)
def test_experts_are_counted_or_a_share_of_all(value: str, number: int) -> None:
    assert experts_counted("--cache_experts", value, 96, 10**9) == number


@pytest.mark.parametrize(
    "value",
    [
        "",
        "%",
        "0",
        "-3",
        "97",
        "101%",
        "0%",
        "12.5",
        "nan",
        "nan%",
        "inf",
        "1e999%",
        "12 experts",
        "5%%",
        "0.1%",
        "0.5GB",
        "-1GB",
        "GB",
        "nanGB",
    ],
)
def test_a_number_of_experts_that_there_are_not_is_refused(value: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^--ram_experts {value}: give a whole number of experts, 1 to 96, or a share of"
    ):
        experts_counted("--ram_experts", value, 96, 10**9)


@given(st.text(max_size=6), st.integers(1, 10**6))
def test_any_other_text_is_refused_too(value: str, everything: int) -> None:
    with contextlib.suppress(ConfigurationError):
        assert 0 <= experts_counted("--cache_experts", value, everything, 10**9) <= everything
