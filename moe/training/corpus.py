"""Text files for language-model training: read, split by document, tokenised into one stream, cut into rows."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from groundwork.errors import ConfigurationError

HELD_OUT_SHARE = 0.02
"""Documents whose text hashes below this share are never trained on; the loss that is reported is theirs."""

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Corpus:
    """Documents by source name, split into training and held-out ones."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    @property
    def characters(self) -> int:
        """Characters of training text."""
        return sum(len(text) for texts in self.train.values() for text in texts)


def read_corpus(paths: list[Path]) -> Corpus:
    """Read `.jsonl` (one `{"text": ...}` a line) and `.txt` files (documents separated by
    blank lines), or all such files of folders.

    A source is named after its file. The split is by blake2b of the text, so that it never changes and duplicates of a
    document stay on one side.

    Raises:
        ConfigurationError: a path is missing, no UTF-8, no JSON, lacks "text", or nothing is left to train on.
    """
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for path in _text_files(paths):
        for text in _documents(path):
            side = held_out if _share(text) < HELD_OUT_SHARE else train
            side.setdefault(path.stem, []).append(text)
    if not train:
        raise ConfigurationError(
            f"--text {' '.join(map(str, paths))}: no text found; give {' or '.join(SUFFIXES)} files that hold some"
        )
    return Corpus(train, held_out)


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[npt.NDArray[np.int32]]:
    """Tokenise each document as `<s> ... </s>`; returns one int32 array per document."""
    end = tokenizer.eos_token_id
    encoded = tokenizer(documents)["input_ids"] if documents else []
    return [np.asarray([*ids, end], dtype=np.int32) for ids in encoded]


def training_rows(documents: list[npt.NDArray[np.int32]], length: int, seed: int, epoch: int) -> npt.NDArray[np.int32]:
    """Concatenate the documents in this epoch's order and cut them into rows; returns int32 [rows, length + 1].

    Consecutive rows share one token, so that every token but the stream's first is predicted once.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(documents))
    stream = np.concatenate([documents[index] for index in order])
    rows = (len(stream) - 1) // length
    windows = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length][:rows]
    return np.random.default_rng((seed, epoch, 1)).permutation(windows)


def fingerprint(documents: list[npt.NDArray[np.int32]]) -> str:
    """A digest of the tokenised training text, for refusing to resume on another one."""
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(document.tobytes())
    return digest.hexdigest()


def _share(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _text_files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        elif path.is_file() and path.suffix in SUFFIXES:
            yield path
        else:
            raise ConfigurationError(f"--text {path}: not a folder or a {' or '.join(SUFFIXES)} file; check the path")


def _documents(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv") from None
    if path.suffix == ".txt":
        yield from (part.strip() for part in content.split("\n\n") if part.strip())
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ConfigurationError(f'{path}, line {number}: not an object with a "text" string; correct it') from None
        if text.strip():
            yield text
