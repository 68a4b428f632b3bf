"""Where texts come from: `--datasets` becomes sources, each with its name and its weight.

The list is cut at commas. An item is a mix, a registered name, NAME=PATH or a path, and may end in `:WEIGHT`, a decimal
number; nothing else after a colon is taken for a weight, so `notes:2.txt` is a file. A folder whose own name ends
in a colon and a number is written with a slash behind it, `runs:2/`.
"""

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

from collection.hub import HubSource, keep_revisions
from collection.installed import KINDS
from collection.local_copies import local_copy
from collection.local_files import BUILDERS, FileSource, as_one, readable_files, suffix_of
from collection.registry import HUB, MIXES, known_names
from collection.sources import InstalledSource, Row, Source
from groundwork.errors import ConfigurationError

__all__ = ["Row", "Source", "keep_revisions", "resolve"]

NAME = re.compile(r"[\w.-]+")
WEIGHTED = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")


def resolve(names: str, dataset_root: Path | None = None) -> list[Source]:
    """Return the sources that a comma-separated list names: mixes, registered names, NAME=PATH, or paths.

    A folder is one source for each file in it, or, as NAME=FOLDER, a single one. A weight is that of each source which
    the item stands for; without one it is 1. `dataset_root` holds registered names as local files.
    Raises ConfigurationError for unknown names, missing files, weights of 0 and names that occur twice.
    """
    if dataset_root is not None and not dataset_root.is_dir():
        raise ConfigurationError(f"--dataset_root {dataset_root}: no such folder; name the one with the data sets")
    items = [item.strip() for item in names.split(",") if item.strip()]
    if not items:
        raise ConfigurationError(f"--datasets: names no data set; known are {known_names()}; or give a file")
    sources: list[Source] = []
    for item in items:
        what, weight = _split_weight(item)
        for member in MIXES.get(what, (what,)):
            for source in _resolve_item(member, dataset_root):
                source.weight = weight
                source.facts |= {"weight": float(weight)} if weight != 1 else {}
                sources.append(source)
    for name, times in Counter(source.name for source in sources).items():
        if times > 1:
            raise ConfigurationError(
                f"--datasets: {times} data sets are called '{name}'; leave one out, or give a file another name with "
                "NAME=PATH; to weigh one member of a mix, list its members"
            )
    return sources


def _split_weight(item: str) -> tuple[str, Fraction]:
    match = WEIGHTED.fullmatch(item)
    if match is None:
        return item, Fraction(1)
    weight = Fraction(match[2])
    if weight == 0:
        raise ConfigurationError(
            f"--datasets {item}: a weight of 0 asks for nothing; raise it, or leave {match[1]} out"
        )
    return match[1], weight


def _resolve_item(item: str, dataset_root: Path | None) -> list[Source]:
    name, equals, path = item.partition("=")
    if equals:
        if not NAME.fullmatch(name):
            raise ConfigurationError(f"--datasets {item}: '{name}' is no name; use letters, digits, '_', '-' and '.'")
        if not path:
            raise ConfigurationError(f"--datasets {item}: names no path; give NAME=PATH")
        return [FileSource(name, as_one(Path(path), readable_files(Path(path), item), name), path)]
    if dataset_root is not None and NAME.fullmatch(item):
        copy = local_copy(dataset_root, item, HUB.get(item))
        if copy is not None:
            return [copy]
    if item in KINDS:
        return [InstalledSource(item)]
    if item in HUB:
        if dataset_root is None:
            return [HubSource(item, HUB[item])]
        raise ConfigurationError(
            f"--dataset_root {dataset_root}: holds no {item} ({', '.join(item + suffix for suffix in BUILDERS)}, or a "
            f"folder {item} or {HUB[item].repository}); put it there, or leave that option out to read it from the hub"
        )
    if Path(item).exists() or "/" in item or suffix_of(Path(item)):
        files = readable_files(Path(item), item)
        return [FileSource(file.name.removesuffix(suffix_of(file)), [file], str(file)) for file in files]
    raise ConfigurationError(
        f"--datasets {item}: unknown data set; known are {known_names()}; or give NAME=PATH or a path to a "
        f"{', '.join(BUILDERS)} file, each with :WEIGHT behind it or without"
    )
