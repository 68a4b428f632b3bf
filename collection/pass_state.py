"""What a pass has reached, on disk: hidden states after the last finished layer, and the routing of all finished ones.

`progress.json` says which shards the pass holds and how many layers are finished. A layer's files are written and
fsync'ed first, that file is replaced then, and the hidden states of the layer before go last. So whenever a run ends,
all that `progress.json` speaks of is there, and whatever else lies in the folder is written anew or deleted.

A block is some consecutive batches, whose tensors share a file, with checksums that are compared when they are read.
Tensors are named by batch: `hidden/12`, `ids.3/12`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

from torch import Tensor

from collection.tensor_files import read_tensors, write_tensors
from groundwork.atomic import fsync_folder, write_json
from groundwork.errors import ConfigurationError

WORKING_FOLDER = Path(".tmp") / "pass"  # in the run's folder; where several workers share it, pass-<attempt>
_PROGRESS = "progress.json"


class BlockResult(NamedTuple):
    """What a layer made of the batches of a block, by batch: hidden states, and what its router showed."""

    block: int
    hidden: dict[int, Tensor]
    shown: dict[int, dict[str, Tensor]]


class PassState:
    """The files of one pass over the shards with the numbers `shards`, in `folder`, which holds nothing else.

    `layers` are finished, and `notes` say, by batch, what is to be said of it. Raises ConfigurationError for files that
    can not be read.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        shards: list[int],
        layers: int = 0,
        notes: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.folder, self.shards, self.layers, self.notes = folder, shards, layers, dict(notes)
        self._fingerprint = fingerprint

    @classmethod
    def begin(cls, folder: Path, fingerprint: str, shards: list[int]) -> Self:
        """Return the state of a pass that is about to start; what another one left is deleted."""
        cls.clear(folder)
        folder.mkdir(parents=True)
        return cls(folder, fingerprint, shards)

    @classmethod
    def found(cls, folder: Path, fingerprint: str) -> Self | None:
        """Return the state that a run of this plan has left; None where there is none, or it had finished no layer."""
        try:
            facts = json.loads((folder / _PROGRESS).read_text())
            notes = {int(batch): str(note) for batch, note in facts["notes"].items()}
            state = cls(folder, str(facts["fingerprint"]), list(map(int, facts["shards"])), int(facts["layers"]), notes)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(folder / _PROGRESS, folder, error) from error
        return state if state._fingerprint == fingerprint else None

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete all that is there, the file that speaks of the others first."""
        (folder / _PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def write(self, result: BlockResult) -> None:
        """Write what the next layer made of a block; without hidden states after the last one."""
        if result.hidden:
            named = {f"hidden/{batch}": tensor for batch, tensor in result.hidden.items()}
            write_tensors(self._hidden(self.layers + 1) / _name(result.block), named)
        shown = {f"{name}/{batch}": each for batch, own in result.shown.items() for name, each in own.items()}
        write_tensors(self._routing(self.layers) / _name(result.block), shown)

    def commit(self, notes: Mapping[int, str]) -> None:
        """Note that the next layer is finished, all of whose blocks are written, and what is to be said of batches."""
        written = [self._hidden(self.layers + 1), self._routing(self.layers)]
        for folder in written:
            if folder.exists():
                fsync_folder(folder)
        self.layers, self.notes = self.layers + 1, dict(notes)
        facts = {
            "fingerprint": self._fingerprint,
            "shards": self.shards,
            "layers": self.layers,
            "notes": {str(batch): note for batch, note in self.notes.items()},
        }
        write_json(self.folder / _PROGRESS, facts)
        for path in self.folder.glob("hidden-*"):
            if path not in written:
                shutil.rmtree(path)

    def hidden(self, block: int) -> dict[int, Tensor]:
        """Return the hidden states of a block after the last finished layer, by batch."""
        return {batch: own["hidden"] for batch, own in self._read(self._hidden(self.layers) / _name(block)).items()}

    def shown(self, block: int) -> dict[int, list[dict[str, Tensor]]]:
        """Return, by batch, what each finished layer's router showed."""
        layers = [self._read(self._routing(layer) / _name(block)) for layer in range(self.layers)]
        return {
            batch: [own[batch] for own in layers if batch in own] for batch in {each for own in layers for each in own}
        }

    def _hidden(self, layers: int) -> Path:
        return self.folder / f"hidden-{layers:05d}"

    def _routing(self, layer: int) -> Path:
        return self.folder / f"routing-{layer:05d}"

    def _read(self, path: Path) -> dict[int, dict[str, Tensor]]:
        tensors: dict[int, dict[str, Tensor]] = {}
        try:
            for key, tensor in read_tensors(path).items():
                name, _, batch = key.rpartition("/")
                tensors.setdefault(int(batch), {})[name] = tensor
        except (OSError, ValueError) as error:
            raise _damaged(path, self.folder, error) from error
        return tensors


def state_folders(run_dir: Path) -> list[Path]:
    """Return the folders of all passes that a run has left."""
    return sorted((run_dir / WORKING_FOLDER).parent.glob(f"{WORKING_FOLDER.name}*/"))


def _name(block: int) -> str:
    return f"{block:05d}.safetensors"


def _damaged(path: Path, folder: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: can not be read ({type(error).__name__}: {str(error)[:120]}); delete {folder}, which costs one pass "
        "through the model, and run again with --resume"
    )
