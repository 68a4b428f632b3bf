"""Reading profiles: the packaged ones by name, others from TOML files with a dataclass's fields as keys."""

import dataclasses
import json
import tomllib
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from groundwork.errors import ConfigurationError
from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.model import ModelProfile

Profile = TypeVar("Profile", HardwareProfile, ModelProfile)

DATA = resources.files("groundwork.profiles") / "data"
GUIDE = "docs/HARDWARE.md"
_LARGEST_FILE = 1_000_000  # bytes; a profile has some hundreds
_WORDS = {
    str: "a text", float: "a number", int: "a whole number",
    tuple[str, ...]: "a list of texts", dict[str, float]: "a table of numbers",
}  # fmt: skip


def known_hardware() -> list[str]:
    """Return the names of the packaged hardware profiles."""
    return sorted(_packaged("hardware"))


def known_models() -> list[str]:
    """Return the names of the packaged model profiles."""
    return sorted(_packaged("models"))


def hardware_profile(name_or_file: str | Path) -> HardwareProfile:
    """Return the packaged profile of a name, or read a `.toml` file; raises ConfigurationError where neither works."""
    found = _find("hardware", name_or_file)
    if found is None:
        raise ConfigurationError(
            f"--hardware {name_or_file}: no profile of this name; use measure, one of {', '.join(known_hardware())}, "
            f"or a .toml file as {GUIDE} describes it"
        )
    return _read(found, HardwareProfile)


def model_profile(name_or_file: str | Path) -> ModelProfile:
    """Return the packaged profile of a name, or read a `.toml` file; raises ConfigurationError where neither works."""
    found = _find("models", name_or_file)
    if found is None:
        raise ConfigurationError(
            f"--model_profile {name_or_file}: no profile of this name; use one of {', '.join(known_models())}, "
            f"or a .toml file as {GUIDE} describes it"
        )
    return _read(found, ModelProfile)


def model_profile_for(trace_model_name: str) -> ModelProfile:
    """Return the packaged profile of the model that a trace names: by one of its names, or the last part of a hub id.

    Upper and lower case are the same. Raises ConfigurationError where no profile has such a name.
    """
    wanted = _spellings([trace_model_name])
    for name in known_models():
        profile = model_profile(name)
        if wanted & _spellings([profile.name, *profile.names]):
            return profile
    raise ConfigurationError(
        f"no model profile is known for {trace_model_name!r}, as the traces call their model; name one with "
        f"--model_profile: one of {', '.join(known_models())}, or a .toml file as {GUIDE} describes it"
    )


def profile_toml(profile: HardwareProfile | ModelProfile) -> str:
    """Return a profile as the text of a TOML file, which reads back as the same profile."""
    fields = ((each.name, getattr(profile, each.name)) for each in dataclasses.fields(profile))
    return "".join(f"{name} = {_toml(value)}\n" for name, value in fields)


def _packaged(kind: str) -> dict[str, Traversable]:
    files = (each for each in (DATA / kind).iterdir() if each.name.endswith(".toml"))
    return {each.name.removesuffix(".toml"): each for each in files}


def _find(kind: str, name_or_file: str | Path) -> Traversable | None:
    text = str(name_or_file)
    if isinstance(name_or_file, Path) or text.lower().endswith(".toml"):
        return Path(text)
    return _packaged(kind).get(text.strip().lower().replace("_", "-").replace(" ", "-"))


def _spellings(names: Iterable[str]) -> set[str]:
    parts = (name.strip().rstrip("/").casefold() for name in names)
    return {spelling for part in parts for spelling in (part, part.rpartition("/")[2]) if spelling}


def _read(file: Traversable, kind: type[Profile]) -> Profile:
    """Return the profile in a file; its errors name the file, the key and what to write."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{file}: {reason}; name a profile's .toml file ({GUIDE})") from error
    if len(content) > _LARGEST_FILE:
        raise ConfigurationError(f"{file}: larger than {_LARGEST_FILE} bytes; name a profile's .toml file ({GUIDE})")
    try:
        found = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, no UTF-8, numbers of thousands of digits
        raise ConfigurationError(f"{file}: not TOML ({error}); write it as {GUIDE} describes") from error
    known = {each.name: each for each in dataclasses.fields(kind)}
    required = {name for name, each in known.items() if each.default is dataclasses.MISSING}
    for complaint, keys in (("is unknown", found.keys() - known.keys()), ("is missing", required - found.keys())):
        if keys:
            raise ConfigurationError(
                f"{file}: key {', '.join(map(repr, sorted(keys)))} {complaint}; the keys are {', '.join(known)}"
            )
    types = get_type_hints(kind)
    values = {name: _converted(file, name, value, types[name]) for name, value in found.items()}
    try:
        return kind(**values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from error


def _converted(file: Traversable, name: str, value: Any, kind: Any) -> Any:
    """Return a TOML value as a field's type; raises ConfigurationError for a value of another."""
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is int and type(value) is int:  # in TOML, true is no number
            return value
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        if kind == dict[str, float] and isinstance(value, dict):
            return {key: _converted(file, f"{name}.{key}", each, float) for key, each in value.items()}
    except OverflowError as error:
        raise ConfigurationError(f"{file}: {name} is too large for a number; lower it") from error
    raise ConfigurationError(f"{file}: {name} is {_short(value)}; write {_WORDS[kind]} there")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _toml(value: Any) -> str:
    if isinstance(value, str):  # JSON's escapes are TOML's, but DEL needs one here
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    return repr(value)
