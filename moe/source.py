"""Where a model's files are: a local folder or the hub, and one clear sentence where they can not be used."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoTokenizer
from transformers.utils import logging

from groundwork.errors import ConfigurationError
from moe.checksums import read_index

_transformers_logging: Any = logging  # not annotated by transformers
_HUB_TIMEOUT_SECONDS = 10.0
_OTHER_FORMATS = ["original/*", "metal/*", "consolidated*"]  # second copies of the weights, for other programs
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Source:
    """A model's files on this machine, its name, and its revision on the hub where that is known.

    A packed model has name and revision of the model that it was made of. Of a model `from_hub` only what was asked for
    has been fetched.
    """

    folder: Path
    name: str
    revision: str | None
    from_hub: bool = False


def find_source(path: str, *, weights: bool = False) -> Source:
    """Return the local folder of a model; from a hub id fetch it, its weights only if asked for.

    Raises ConfigurationError for a folder that is missing or holds no config.json, for a packed model's index that can
    not be read, and where the hub does not help.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"{folder}: holds no config.json; name the folder that a model was saved to, "
                "with config.json, tokenizer.json and safetensors files"
            )
        packed = read_index(folder)
        return Source(folder, packed.model, packed.revision) if packed else Source(folder, folder.resolve().name, None)
    looks_like_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".")
    if not looks_like_hub_id or folder.parent.is_dir():
        raise ConfigurationError(
            f"{path}: no such folder; give the folder of a saved model, or a hub id such as mistralai/Mixtral-8x7B-v0.1"
        )
    wanted = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        # One quick question first: left to itself the download would retry a dead network for half a minute.
        revision = HfApi(endpoint=constants.ENDPOINT).model_info(path, timeout=_HUB_TIMEOUT_SECONDS).sha
        fetched = snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=_OTHER_FORMATS)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise ConfigurationError(
            f"{path}: no such folder, and the hub answers {status} for a model of this name; check it, accept its "
            "licence on the hub and log in with 'hf auth login', or give a local folder"
        ) from error
    except Exception as error:
        # httpx, requests and huggingface_hub each have their own network errors; none of them is worth telling apart.
        try:
            fetched = snapshot_download(path, allow_patterns=wanted, local_files_only=True)
        except (LocalEntryNotFoundError, OSError):
            raise ConfigurationError(
                f"{path}: no such folder, and the hub can not be reached to ask for a model of this name "
                f"({type(error).__name__}); check the path, or copy the model's folder to this machine"
            ) from error
    return Source(Path(fetched), path, Path(fetched).name, from_hub=True)


def read_tokenizer(source: Source) -> Any:
    """Return the model's tokenizer; raises ConfigurationError where there is none."""
    if not any((source.folder / name).is_file() for name in _VOCABULARY_FILES):
        raise ConfigurationError(
            f"{source.folder}: holds no tokenizer (none of {', '.join(_VOCABULARY_FILES)}); "
            "copy the tokenizer files of the model into this folder"
        )
    with refusing(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)


def require_safetensors(source: Source) -> None:
    """Raise ConfigurationError where a model's folder holds no weights that are read here."""
    if any(source.folder.glob("*.safetensors")):
        return
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in source.folder.glob(pattern))
    raise ConfigurationError(
        f"{source.folder}: holds no *.safetensors files"
        + (f", and weights in other formats ({others[0]}) are not read" if others else "")
        + "; fetch them, or save the model in this format with transformers' save_pretrained"
    )


@contextmanager
def refusing(source: Source, part: str) -> Iterator[None]:
    """Turn whatever transformers says of unusable files into one sentence, and keep its own reports quiet."""
    try:
        with quiet():
            yield
    except ConfigurationError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"{source.folder}: does not fit in the device's memory; "
            "use --quantization nf4, a smaller model or --device cpu"
        ) from error
    except Exception as error:
        # Unreadable files surface as OSError, ValueError, KeyError, RuntimeError, SafetensorError, ... by library.
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{source.folder}: its {part} can not be used ({type(error).__name__}: {reason}); "
            "copy or download the model again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and reports from stderr, which is ours."""
    verbosity, bars = _transformers_logging.get_verbosity(), _transformers_logging.is_progress_bar_enabled()
    _transformers_logging.set_verbosity_error()
    _transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        _transformers_logging.set_verbosity(verbosity)
        if bars:
            _transformers_logging.enable_progress_bar()
