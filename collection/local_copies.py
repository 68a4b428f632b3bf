"""`--dataset_root`: data sets in a folder of one's own, as one file each or as copies of their hub repositories."""

import re
from pathlib import Path

from collection.local_files import BUILDERS, FileSource, as_one, readable_files
from collection.registry import HubDataset
from groundwork.errors import ConfigurationError


def local_copy(root: Path, name: str, registered: HubDataset | None) -> FileSource | None:
    """Return a registered or other data set out of `--dataset_root`, or None where it holds none of that name.

    Looked for are `NAME.jsonl` (or another suffix), then the folders `NAME` and, like the hub, `OWNER/REPOSITORY`. A
    folder holds the files of the split, as on the hub, or files of one format, all of them read.
    """
    for suffix in BUILDERS:
        file = root / f"{name}{suffix}"
        if file.is_file():
            return FileSource(name, [file], str(file), registered)
    for folder in [root / name, *([root / registered.repository] if registered else [])]:
        if folder.is_dir():
            files = _split_files(folder, registered) or as_one(folder, readable_files(folder, name), name)
            return FileSource(name, files, str(folder), registered)
    return None


def _split_files(folder: Path, registered: HubDataset | None) -> list[Path]:
    """Return the files of the split as they are named on the hub, `[CONFIG/]SPLIT[-00000-of-0000N].SUFFIX`, or [].

    Raises ConfigurationError where some of the N are missing, or where several folders hold the split.
    """
    config, split = (registered.config, registered.split) if registered else (None, "train")
    endings = "|".join(map(re.escape, BUILDERS))
    pattern = re.compile(rf"{re.escape(split)}(?:-(\d{{5}})-of-(\d{{5}})(?:-[0-9a-f]+)?)?(?:{endings})")
    found = sorted(path for path in folder.rglob(f"{split}*") if path.is_file() and pattern.fullmatch(path.name))
    if config is not None:
        found = [path for path in found if config in path.relative_to(folder).parts[:-1]] or [
            path for path in found if path.parent == folder
        ]
    parents = sorted({str(path.parent) for path in found})
    if len(parents) > 1:
        raise ConfigurationError(f"{folder}: holds split '{split}' in {', '.join(parents)}; keep one of them there")
    parts = [match.groups() for path in found if (match := pattern.fullmatch(path.name))]
    wanted = int(parts[0][1] or 1) if parts else 0
    if [int(part or 0) for part, _ in parts] != list(range(wanted)) or len({total for _, total in parts}) > 1:
        raise ConfigurationError(
            f"{folder}: of split '{split}' there are {', '.join(path.name for path in found)}, wanted are {wanted} "
            "files, each once; fetch the folder again"
        )
    return found
