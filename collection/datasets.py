"""Where texts come from: `--datasets` becomes sources, and each source streams its rows in their own fixed order.

Local files and hub sets go through one `datasets.load_dataset(..., streaming=True)` call; a row is one line of a .txt
or .jsonl file, one record of a .csv or .parquet file. The library splits at line ends only: texts may
hold U+2028.
"""

import codecs
import contextlib
import glob
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from collection.installed import KINDS, read_installed
from collection.registry import HUB, MIXES, HubDataset, known_names
from groundwork.errors import ConfigurationError, ExpertSpeculationError

BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False}}  # else the text 'NA' would be read as missing
ROWS_LOOKED_AT = 100  # to tell which column is the text
HUB_TIMEOUT_SECONDS = 10.0


class Row(NamedTuple):
    """One candidate: its number in the source, a key that finds it there again, and its text ('' where missing)."""

    number: int
    key: str
    text: str


class Source(ABC):
    """One named data set; `facts` says where it is and under which licence, and more once it has been read."""

    def __init__(self, name: str, location: str, licence: str) -> None:
        self.name = name
        self.facts: dict[str, Any] = {"name": name, "location": location, "licence": licence}

    @abstractmethod
    def read(self) -> Iterator[Row]:
        """Yield every row, in the same order each time; raises ConfigurationError where it can not be read."""


class InstalledSource(Source):
    """One of the kinds of text that every installation holds."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, "installed packages", "that of each package")

    def read(self) -> Iterator[Row]:
        times: Counter[str] = Counter()
        for number, (key, text) in enumerate(read_installed(self.name)):
            times[key] += 1
            yield Row(number, key if times[key] == 1 else f"{key}~{times[key]}", text)


class FileSource(Source):
    """Local files of one suffix; keys are file#row."""

    def __init__(self, name: str, files: list[Path], location: str, registered: HubDataset | None = None) -> None:
        super().__init__(name, location, registered.licence if registered else "not stated")
        self.files = files
        self.fields = ("text", registered.text_field) if registered else ("text",)

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
        builder = BUILDERS[path.suffix]
        if path.stat().st_size == 0:
            raise ConfigurationError(f"{path}: is empty; give a file with one text a row")
        if builder != "parquet":
            require_utf8(path)
        try:
            # The library takes a file name for a pattern, so its brackets and stars are escaped.
            rows = _stream(builder, data_files=glob.escape(str(path.resolve())), **OPTIONS.get(builder, {}))
            head = list(islice(rows, ROWS_LOOKED_AT))
            field = self.facts["text_field"] = _text_field(head, self.fields, str(path))
            for row in chain(head, rows):
                yield _as_text(row.get(field)).removeprefix("\ufeff")
        except (ConfigurationError, GeneratorExit):
            raise
        except Exception as error:
            # Each builder has its own errors (ArrowInvalid, ParserError, DatasetGenerationError, ...).
            raise ConfigurationError(
                f"{path}: can not be read as {path.suffix} ({_first_line(error)}); repair the file or fix its suffix"
            ) from error


class HubSource(Source):
    """A public data set on the Hugging Face hub, streamed; keys are split#row."""

    def __init__(self, name: str, registered: HubDataset) -> None:
        super().__init__(name, f"https://huggingface.co/datasets/{registered.repository}", registered.licence)
        self.registered = registered

    def read(self) -> Iterator[Row]:
        from huggingface_hub import HfApi, constants

        entry, number = self.registered, 0
        try:
            # One quick question first: left to itself the library would retry a dead network for minutes.
            api = HfApi(endpoint=constants.ENDPOINT)
            revision = api.dataset_info(entry.repository, timeout=HUB_TIMEOUT_SECONDS).sha
        except Exception as error:
            # httpx, requests and huggingface_hub each have their own network errors; all mean the same here.
            raise ConfigurationError(
                f"data set '{self.name}': the hub gives no {entry.repository} ({type(error).__name__}); put "
                f"{self.name}.jsonl into a folder and name that with --dataset_root, or use --datasets installed"
            ) from error
        self.facts |= {"revision": revision, "config": entry.config, "split": entry.split}
        try:
            rows = _stream(entry.repository, name=entry.config, split=entry.split, revision=revision)
            head = list(islice(rows, ROWS_LOOKED_AT))
            field = self.facts["text_field"] = _text_field(head, (entry.text_field,), entry.repository)
            for number, row in enumerate(chain(head, rows)):
                yield Row(number, f"{entry.split}#{number}", _as_text(row.get(field)))
        except (ConfigurationError, GeneratorExit):
            raise
        except Exception as error:
            raise ExpertSpeculationError(
                f"data set '{self.name}': the hub failed at row {number} ({_first_line(error)}); try again, or read "
                "the data set from a folder with --dataset_root"
            ) from error


def resolve(names: str, dataset_root: Path | None = None) -> list[Source]:
    """Return the sources that a comma-separated list names: mixes, registered names, NAME=PATH, or paths.

    A folder is one source for each file in it, or, as NAME=FOLDER, a single one. `dataset_root` holds registered names
    as local files. Raises ConfigurationError for unknown names, missing files and names that occur twice.
    """
    if dataset_root is not None and not dataset_root.is_dir():
        raise ConfigurationError(f"--dataset_root {dataset_root}: no such folder; name the one with the data sets")
    items = [item.strip() for item in names.split(",") if item.strip()]
    if not items:
        raise ConfigurationError(f"--datasets: names no data set; known are {known_names()}; or give a file")
    members = [member for item in items for member in MIXES.get(item, (item,))]
    sources = [source for member in members for source in _resolve_item(member, dataset_root)]
    for name, times in Counter(source.name for source in sources).items():
        if times > 1:
            raise ConfigurationError(f"--datasets: {times} data sets are called '{name}'; rename with NAME=PATH")
    return sources


def require_utf8(path: Path) -> None:
    """Raise ConfigurationError, naming line and byte, unless the whole file is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, lines = 0, 1  # bytes and lines up to the block
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 20)
            seen = decoder.getstate()[0] + block  # a character may lie across two blocks
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + seen[: error.start].count(b"\n")
                raise ConfigurationError(
                    f"{path}: byte {before - (len(seen) - len(block)) + error.start} (0x{seen[error.start]:02x}, line "
                    f"{line}) is not UTF-8; convert the file to UTF-8, for instance with iconv"
                ) from error
            if not block:
                return
            before += len(block)
            lines += block.count(b"\n")


def _resolve_item(item: str, dataset_root: Path | None) -> list[Source]:
    name, equals, path = item.partition("=")
    if equals:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigurationError(f"--datasets {item}: '{name}' is no name; use letters, digits, '_', '-' and '.'")
        files = _files(Path(path), item)
        if len({file.suffix for file in files}) > 1:
            raise ConfigurationError(f"{path}: holds files of several kinds; give a folder of one kind for {name}=")
        return [FileSource(name, files, path)]
    if dataset_root is not None:
        for suffix in BUILDERS:
            file = dataset_root / f"{item}{suffix}"
            if file.is_file():
                return [FileSource(item, [file], str(file), HUB.get(item))]
    if item in KINDS:
        return [InstalledSource(item)]
    if item in HUB:
        if dataset_root is None:
            return [HubSource(item, HUB[item])]
        raise ConfigurationError(
            f"--dataset_root {dataset_root}: holds no {item} ({', '.join(item + suffix for suffix in BUILDERS)}); "
            "put the file there, or leave that option out to read it from the hub"
        )
    if Path(item).exists() or "/" in item or Path(item).suffix in BUILDERS:
        return [FileSource(file.stem, [file], str(file)) for file in _files(Path(item), item)]
    raise ConfigurationError(
        f"--datasets {item}: unknown data set; known are {known_names()}; or give NAME=PATH or a path to a "
        f"{', '.join(BUILDERS)} file"
    )


def _files(path: Path, item: str) -> list[Path]:
    if not path.exists():
        raise ConfigurationError(f"--datasets {item}: no such file or folder as '{path}'; check the path")
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.suffix in BUILDERS)
    if not files or files[0].suffix not in BUILDERS:
        what = "is not" if path.is_file() else "holds no"
        raise ConfigurationError(f"{path}: {what} a {', '.join(BUILDERS)} file; convert the texts to one of them")
    return files


def _stream(path: str, *, split: str = "train", **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set; the one place where `datasets` is called."""
    import datasets

    with _quiet():
        loaded = datasets.load_dataset(path, split=split, streaming=True, **options)
        yield from loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from logging what is raised anyway."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _text_field(rows: list[dict[str, Any]], wanted: tuple[str, ...], where: str) -> str:
    """Return the column that holds the texts: a wanted one, else the only one that holds strings."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in wanted:
        if name in columns:
            return name
    if not columns:
        raise ConfigurationError(f"{where}: holds no rows; give a file with one text a row")
    strings = [name for name in columns if {type(row.get(name)) for row in rows} - {type(None)} == {str}]
    if len(strings) == 1:
        return strings[0]
    raise ConfigurationError(
        f"{where}: has no column '{wanted[0]}', and not exactly one column of strings, among its columns "
        f"{', '.join(columns)}; rename the column that holds the texts to '{wanted[0]}'"
    )


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _first_line(error: BaseException) -> str:
    """Return what went wrong, in a part of a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
