"""A predictor's own options as the command line gives them: `--option NAME=VALUE`, checked before any work is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from groundwork.errors import ConfigurationError
from speculation.predictor import create


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Reads `NAME=VALUE` pairs; a value is JSON, or else the text itself. Raises ConfigurationError on others."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--option {pair}: wanted NAME=VALUE, such as hidden_size=96")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def check_options(predictor: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for an option that the predictor does not have, or for a value of another type."""
    known = create(predictor).options()
    for name, value in options.items():
        if name not in known:
            names = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigurationError(f"--option {name}: unknown to {predictor}; {names}")
        if not _alike(value, known[name]):
            raise ConfigurationError(
                f"--option {name}={json.dumps(value)}: wanted something like {json.dumps(known[name])}"
            )


def _alike(value: Any, default: Any) -> bool:
    """Whether a value has the type of the default, which says nothing where it is None."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple | list):
        return isinstance(value, tuple | list)
    return isinstance(value, type(default))
