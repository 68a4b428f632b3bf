"""From rows of columns to texts: which columns make up the text, and how a conversation becomes one.

Columns are joined by an empty line. A column that holds a conversation, a list of turns, is written out turn by turn
with an empty line between: `speaker: what is said`, or what is said alone where a turn is a bare string. No model's
chat template is applied, so a source has the same texts for every model.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

ROWS_LOOKED_AT = 100  # to tell which column is the text
ROWS_AT_ONCE = 256
SPEAKER, SAID = ("role", "from"), ("content", "value")  # keys of a turn, as in `messages` and in `conversations`

SETTINGS: dict[str, int | bool] = {
    "HF_UPDATE_DOWNLOAD_COUNTS": False,
    "STREAMING_READ_MAX_RETRIES": 1,
    "STREAMING_READ_RETRY_INTERVAL": 0,
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 0,
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL": 0,
    "STREAMING_OPEN_MAX_RETRIES": 1,
    "STREAMING_OPEN_RETRY_INTERVAL": 0,
}
"""Settings of `datasets` while it works for us: it reports no use, which it else does even of local files, and does
not retry in silence, 20 times and for minutes, what we retry ourselves."""

Rows = list[dict[str, Any]]


class Table:
    """A data set as `datasets` streams it: `head`, its first rows, and the texts that chosen columns make up."""

    def __init__(self, path: str, *, split: str = "train", **options: Any) -> None:
        import datasets

        with _library():
            self._loaded = datasets.load_dataset(path, split=split, streaming=True, **options)
            self.head: Rows = list(islice(self._loaded, ROWS_LOOKED_AT))

    def texts(self, fields: tuple[str, ...]) -> Iterator[str]:
        """Yield the text of every row, '' where it has none; other columns are not decoded."""
        rows = iter(self._loaded.select_columns(list(fields)))
        while True:
            with _library():  # never held while the caller works
                some = list(islice(rows, ROWS_AT_ONCE))
            if not some:
                return
            for row in some:
                yield "\n\n".join(filter(None, (as_text(row.get(name)) for name in fields)))


def columns_of(rows: Rows) -> list[str]:
    """Return the names of all columns, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def find_fields(rows: Rows, wanted: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    """Return the first of the `wanted` groups of columns that is there in full."""
    columns = set(columns_of(rows))
    return next((fields for fields in wanted if columns.issuperset(fields)), None)


def only_strings(rows: Rows) -> tuple[str, ...] | None:
    """Return the only column that holds strings, where there is just one."""
    strings = [name for name in columns_of(rows) if {type(row.get(name)) for row in rows} - {type(None)} == {str}]
    return (strings[0],) if len(strings) == 1 else None


def as_text(value: Any) -> str:
    """Return a string as it is, a list of turns written out, and '' for anything else."""
    if isinstance(value, str):
        return value.removeprefix("\ufeff")
    if isinstance(value, list):
        return "\n\n".join(filter(None, map(_turn, value)))
    return ""


def first_line(error: BaseException) -> str:
    """Return what went wrong, in a part of a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _turn(turn: Any) -> str:
    if not isinstance(turn, dict):
        return as_text(turn)
    speaker, said = (
        next((turn[key] for key in keys if isinstance(turn.get(key), str)), "") for keys in (SPEAKER, SAID)
    )
    return f"{speaker}: {said}" if speaker and said else said


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Apply SETTINGS, and keep `datasets` from logging what is raised anyway."""
    from datasets import config
    from datasets.utils import logging

    verbosity, before = logging.get_verbosity(), {name: getattr(config, name) for name in SETTINGS}
    logging.set_verbosity(logging.CRITICAL)
    for name, value in SETTINGS.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        for name, value in before.items():
            setattr(config, name, value)
