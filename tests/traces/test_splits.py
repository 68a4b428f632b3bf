"""A sequence's split depends on its text alone and the fractions are 80/5/5/10."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwork.errors import ConfigurationError
from traces.splits import SPLITS, split_of, splits_named

int32s = st.integers(-(2**31), 2**31 - 1)


def test_fractions_are_those_of_the_protocol():
    counts = Counter(split_of(np.array([n, n + 1], np.int32), ["", ""]) for n in range(20_000))
    for split, fraction in {"train": 0.8, "validation_stop": 0.05, "validation_fit": 0.05, "test": 0.1}.items():
        assert abs(counts[split] / 20_000 - fraction) < 0.01  # over three standard errors


def test_known_sequence_stays_where_it_was():
    """Guards the hash itself: a change would move texts between the splits of runs made before and after it."""
    ids = [np.array([n], np.int32) for n in range(12)]
    assert [split_of(i, ["x"])[:5] for i in ids] == KNOWN_IDS
    assert [split_of(np.array([-1], np.int32), [str(n)])[:5] for n in range(12)] == KNOWN_STRINGS


@given(st.lists(int32s.filter(lambda n: n != -1), min_size=1), st.text())
def test_token_strings_are_ignored_where_ids_are_known(ids, token):
    array = np.array(ids, np.int32)
    assert split_of(array, [token] * len(ids)) == split_of(array.astype(">i4"), [""] * len(ids))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_unknown_ids_fall_back_to_strings(tokens):
    unknown = np.full(len(tokens), -1, np.int32)
    assert split_of(unknown, tokens) in SPLITS["all"]
    assert split_of(unknown, tokens) == split_of(unknown[:1], ["\0".join(tokens)])


def test_elementary_splits_are_disjoint_and_all_holds_them():
    parts = [SPLITS[name] for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(SPLITS["all"]) == len(frozenset().union(*parts))
    assert splits_named("validation") == {"validation_stop", "validation_fit"}
    with pytest.raises(ConfigurationError, match="--split dev: unknown; choose one of train, validation"):
        splits_named("dev")


KNOWN_IDS = ["train", "train", "train", "train", "train", "valid", "train", "train", "test", "train", "valid", "train"]
KNOWN_STRINGS = [
    "train",
    "test",
    "train",
    "train",
    "train",
    "train",
    "train",
    "test",
    "train",
    "train",
    "test",
    "valid",
]
