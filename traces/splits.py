"""Which split a sequence belongs to, decided by its text alone, so that it is the same in every run and every data set.

80 % train, 5 % validation_stop (ends training early), 5 % validation_fit (fits stacking and calibration), 10 % test.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from groundwork.errors import ConfigurationError

# Upper ends of the half-open intervals of u in [0, 1).
_BOUNDS = ((0.80, "train"), (0.85, "validation_stop"), (0.90, "validation_fit"), (1.0, "test"))

ELEMENTARY_SPLITS = [name for _, name in _BOUNDS]

SPLITS: dict[str, frozenset[str]] = {
    "train": frozenset({"train"}),
    "validation": frozenset({"validation_stop", "validation_fit"}),
    "validation_stop": frozenset({"validation_stop"}),
    "validation_fit": frozenset({"validation_fit"}),
    "test": frozenset({"test"}),
    "all": frozenset({"train", "validation_stop", "validation_fit", "test"}),
}


def split_of(token_ids_T: NDArray[np.int32], tokens_T: Sequence[str]) -> str:
    """Return `train`, `validation_stop`, `validation_fit` or `test` for one sequence.

    Hashes the token ids as little-endian int32; where every id is -1 (unknown), the token strings joined by NUL as
    UTF-8.
    """
    ids = np.ascontiguousarray(token_ids_T, dtype="<i4")
    data = "\0".join(tokens_T).encode() if (ids == -1).all() else ids.tobytes()
    u = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
    return next(name for bound, name in _BOUNDS if u < bound or bound == 1.0)


def splits_named(name: str) -> frozenset[str]:
    """Return the elementary splits that `--split name` stands for; raises ConfigurationError on an unknown name."""
    if name not in SPLITS:
        raise ConfigurationError(f"--split {name}: unknown; choose one of {', '.join(SPLITS)}")
    return SPLITS[name]
