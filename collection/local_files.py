"""Texts in local files: a row is a line of a .txt or .jsonl file, a record of a .csv or .parquet file.

All formats go through the library that also streams from the hub. It splits at line ends only: texts may hold U+2028.
"""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collection.registry import HubDataset
from collection.sources import Row, Source
from collection.texts import Table, columns_of, find_fields, first_line, only_strings
from collection.utf8 import bad_json_line, require_utf8
from groundwork.errors import ConfigurationError

BUILDERS = {
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
}
OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False}}  # else the text 'NA' would be read as missing
USUAL_FIELDS = (("text",), ("messages",), ("conversations",))


class FileSource(Source):
    """Local files of one format; keys are file#row."""

    def __init__(self, name: str, files: list[Path], location: str, registered: HubDataset | None = None) -> None:
        super().__init__(name, location, registered.licence if registered else "not stated")
        self.files = files
        self.fields = (registered.text_fields, *USUAL_FIELDS) if registered else USUAL_FIELDS

    def read(self) -> Iterator[Row]:
        number, some_text = 0, False
        for path in self.files:
            for row, text in enumerate(self._texts(path)):
                some_text = some_text or bool(text.strip())
                yield Row(number, f"{path.name}#{row}", text)
                number += 1
        if not some_text:
            raise ConfigurationError(f"{self.facts['location']}: holds no text; give a file with one text a row")

    def _texts(self, path: Path) -> Iterator[str]:
        suffix = suffix_of(path)
        builder = BUILDERS[suffix]
        if path.stat().st_size == 0:
            raise ConfigurationError(f"{path}: is empty; give a file with one text a row")
        if builder != "parquet":
            require_utf8(path)
        if suffix.count(".") > 1 and re.search(r"[\[\]]|::", str(path.resolve())):
            raise ConfigurationError(f"{path}: has brackets or '::' in its path, so it is not unpacked; rename it")
        try:
            # The library takes a file name for a pattern, so its brackets and stars are escaped.
            table = Table(builder, data_files=glob.escape(str(path.resolve())), **OPTIONS.get(builder, {}))
            fields = find_fields(table.head, self.fields) or only_strings(table.head)
            if fields is None:
                raise ConfigurationError(_no_field(path, columns_of(table.head), self.fields[0]))
            self.facts["text_field"] = " + ".join(fields)
            yield from table.texts(fields)
        except (ConfigurationError, PermissionError):
            raise
        except Exception as error:
            # Each builder has its own errors (ArrowInvalid, ParserError, DatasetGenerationError, ...).
            line = bad_json_line(path) if builder == "json" else None
            reason = first_line(error) if line is None else f"line {line} is no JSON object"
            raise ConfigurationError(
                f"{path}: can not be read as {suffix} ({reason}); repair the file or fix its suffix"
            ) from error


def suffix_of(path: Path) -> str:
    """Return the suffix that says the format, both parts of it where the file is packed; '' where we read no such."""
    return next((suffix for suffix in BUILDERS if path.name.endswith(suffix)), "")


def readable_files(path: Path, item: str) -> list[Path]:
    """Return a file, or a folder's files in sorted order; raises ConfigurationError where there is none to be read."""
    if not path.exists():
        before, colon, _ = str(path).rpartition(":")
        remedy = "a weight is a decimal number above 0" if colon and Path(before).exists() else "check the path"
        raise ConfigurationError(f"--datasets {item}: no such file or folder as '{path}'; {remedy}")
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file() and suffix_of(each))
    if not files or not suffix_of(files[0]):
        what = "is not a" if path.is_file() else "holds no"
        raise ConfigurationError(f"{path}: {what} {', '.join(BUILDERS)} file; convert the texts to one of them")
    return files


def as_one(path: Path, files: list[Path], name: str) -> list[Path]:
    """Return the files of one source; raises ConfigurationError unless they are of one format."""
    if len({BUILDERS[suffix_of(file)] for file in files}) > 1:
        raise ConfigurationError(f"{path}: holds files of several kinds; give a folder of one kind for {name}=")
    return files


def _no_field(path: Path, columns: list[str], wanted: tuple[str, ...]) -> str:
    if not columns:
        return f"{path}: holds no rows; give a file with one text a row"
    several = f"columns {' and '.join(wanted)}" if len(wanted) > 1 else f"column '{wanted[0]}'"
    return (
        f"{path}: has no {several}, and not exactly one column of strings, among its columns {', '.join(columns)}; "
        "rename the column that holds the texts to 'text'"
    )
