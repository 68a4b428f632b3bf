"""The one interface of all predictors, and the registry that finds them by name.

Causality, in decoding order: the choice at token t, layer l is step t*L + l. A score for step s at horizon h may use
the routing of steps up to s - h, the id of token t only where l >= h, and nothing else.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from groundwork import atomic
from groundwork.errors import ConfigurationError
from speculation.calibration import PlattScaling, softmax_log_odds
from speculation.features import RoutingBatch
from speculation.live import LiveState
from traces.reader import TraceDataset

MAX_HORIZON = 3
FORMAT_VERSION = 1
COLUMNS = ("ids", "weights", "logits", "lookahead", "tokens")
OPTIONAL_COLUMNS = frozenset({"weights", "logits", "lookahead", "tokens"})
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
CALIBRATION = "calibration_"  # and the horizon: names of tensors beside those of `state`

PREDICTORS: dict[str, type[Predictor]] = {}
P = TypeVar("P", bound="type[Predictor]")


@dataclass(frozen=True)
class RoutingShape:
    """L MoE layers, E experts, K routed per token: what a predictor is built for."""

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, dataset: TraceDataset) -> RoutingShape:
        """The shape of a data set's traces."""
        return cls(dataset.spec.num_layers, dataset.spec.num_experts, dataset.spec.top_k)

    def __str__(self) -> str:
        return f"{self.num_layers} layers, top {self.top_k} of {self.num_experts} experts"


class Predictor(ABC):
    """Scores every expert of every layer before it is chosen; `fit` returns self, fitted state ends in an underscore.

    `requires` names the columns it can not do without, `uses` those it profits from; together they are what it sees.
    """

    name: ClassVar[str]
    requires: frozenset[str] = frozenset({"ids"})
    uses: frozenset[str] = frozenset()
    score_scale: Literal["logits", "log_odds", "shares"] = "logits"  # of a softmax; of being in the set; not below 0

    def __init__(self) -> None:
        self.shape_: RoutingShape | None = None
        self.calibration_: dict[int, PlattScaling] = {}  # by horizon
        self.provenance_: dict[str, Any] = {}
        self.folder_: Path | None = None

    @abstractmethod
    def fit(self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = ()) -> Self:
        """Learns from one split of a trace folder, leaving out the data sets named in `hold_out`."""

    @abstractmethod
    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        """Scores float32 (T, L, E) on the CPU, higher is likelier; layers below `horizon` see earlier tokens only."""

    def start(self) -> LiveState:
        """A sequence about to be decoded, for `predict_next`."""
        if self.shape_ is None:
            raise ValueError(f"{self.name} has not been fitted")
        return LiveState(self.shape_)

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        """Scores float32 (E,) for the step `horizon` after the last observed one; it may be one of the next token.

        Equal to the row of `predict_scores` for that step, up to rounding. This implementation asks for just that row,
        so its cost grows with the sequence; predictors for live use have their own.
        """
        token, layer = state.target(horizon)
        return self.predict_scores(state.as_batch(token + 1), horizon)[token, layer]

    def probabilities(self, scores_TLE: Tensor, horizon: int = 1) -> Tensor | None:
        """P(in the set) of such scores, float32 (T, L, E), ranked as they are; None where it is not calibrated."""
        scaling = self.calibration_.get(horizon)
        return None if scaling is None else scaling.probabilities(self.log_odds(scores_TLE))

    def log_odds(self, scores_TLE: Tensor) -> Tensor:
        """Scores as log-odds, ranked as they are: of being in the set where the scale tells, else of a softmax."""
        if self.score_scale == "log_odds":
            return scores_TLE
        return softmax_log_odds(scores_TLE.clamp_min(1e-6).log() if self.score_scale == "shares" else scores_TLE)

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON holds them."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What `fit` learned, by tensor name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - a predictor that learns nothing has no state
        """Takes back what `state` gave; `shape_` and `uses` are set before."""

    def sees(self, available: Collection[str]) -> list[str]:
        """The columns it would read of those available, in the order of COLUMNS."""
        wanted = (self.requires | self.uses) & frozenset(available)
        return [column for column in COLUMNS if column in wanted]

    def check_columns(self, dataset: TraceDataset, origin: str) -> None:
        """Raises ConfigurationError when a required column is absent from `dataset`."""
        for column in COLUMNS:
            if column in self.requires and column not in dataset.available:
                raise ConfigurationError(f"{origin}: {self.name} requires {_missing_column(column)}")

    def check_shape(self, dataset: TraceDataset, origin: str) -> None:
        """Raises ConfigurationError when this predictor was fitted for a model of another shape."""
        found = RoutingShape.of(dataset)
        if self.shape_ is not None and self.shape_ != found:
            raise ConfigurationError(
                f"{origin}: traces of {found}, but predictor {self.name} was fitted for {self.shape_}; "
                "use traces of the same model or train a predictor on these"
            )

    def check_horizon(self, batch: RoutingBatch, horizon: int) -> None:
        """Raises ConfigurationError for a horizon that no predictor can serve on this batch."""
        if not 1 <= horizon <= min(MAX_HORIZON, batch.num_layers):
            raise ConfigurationError(
                f"--horizon {horizon}: must be 1 to {min(MAX_HORIZON, batch.num_layers)} "
                f"for a model of {batch.num_layers} layers"
            )

    def save_pretrained(self, folder: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes config.json and model.safetensors; the config last, so that a folder with one is complete."""
        if self.shape_ is None:
            raise ValueError(f"{self.name} has not been fitted")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.provenance_ = dict(provenance) if provenance is not None else self.provenance_
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state().items()}
        tensors |= {f"{CALIBRATION}{horizon}": scaling.curves_L2 for horizon, scaling in self.calibration_.items()}
        atomic.write_bytes(path / MODEL_FILE, safetensors.torch.save(tensors))
        config = {
            "format_version": FORMAT_VERSION,
            "predictor": self.name,
            **asdict(self.shape_),
            "requires": sorted(self.requires),
            "uses": sorted(self.uses),
            "options": self.options(),
            "provenance": self.provenance_,
        }
        atomic.write_json(path / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Reads a predictor folder; raises ConfigurationError when it is none or holds another kind."""
        predictor = load_predictor(folder)
        if not isinstance(predictor, cls):
            raise ConfigurationError(f"{folder}: holds a {predictor.name} predictor, not {cls.name}")
        return predictor


def register(predictor: P) -> P:
    """Class decorator: makes a predictor known by its name."""
    PREDICTORS[predictor.name] = predictor
    return predictor


def create(name: str, **options: Any) -> Predictor:
    """A new, unfitted predictor; raises ConfigurationError on an unknown name or option."""
    if name not in PREDICTORS:
        raise ConfigurationError(f"--predictor {name}: unknown; choose one of {', '.join(PREDICTORS)}")
    try:
        return PREDICTORS[name](**options)
    except TypeError as error:
        raise ConfigurationError(f"--predictor {name}: options {sorted(options)} do not fit ({error})") from error


def load_predictor(folder: Path | str) -> Predictor:
    """Reads the predictor in a folder, whatever its kind; raises ConfigurationError when it is none or damaged."""
    path = Path(folder)
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"{path}: no readable {CONFIG_FILE}, so no predictor folder; give one that 'expert-speculation train' wrote"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{path / CONFIG_FILE}: not JSON ({error}); train the predictor again") from error
    if not isinstance(config, dict) or "predictor" not in config:
        raise ConfigurationError(
            f"{path / CONFIG_FILE}: names no predictor; give a folder that 'expert-speculation train' wrote"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise ConfigurationError(
            f"{path / CONFIG_FILE}: format_version {config.get('format_version')}, but this program reads "
            f"{FORMAT_VERSION}; train the predictor again"
        )
    try:
        predictor = create(config["predictor"], **config["options"])
        predictor.shape_ = RoutingShape(*(int(config[key]) for key in ("num_layers", "num_experts", "top_k")))
        predictor.uses = frozenset(config["uses"])
        tensors = read_tensors(path / MODEL_FILE)
        curves = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(CALIBRATION)}
        predictor.load_state(tensors)
        predictor.calibration_ = {
            int(name.removeprefix(CALIBRATION)): PlattScaling(each) for name, each in curves.items()
        }
        predictor.provenance_ = config["provenance"]
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{path}: damaged predictor folder ({error}); train the predictor again") from error
    predictor.folder_ = path
    return predictor


def load_predictors(folders: Iterable[Path | str]) -> dict[str, Predictor]:
    """The predictors of several folders by name; a second one of a name is called `name@folder`, as in evaluation JSON.

    Raises ConfigurationError as `load_predictor` does, and where two such folders have the same name.
    """
    found: dict[str, Predictor] = {}
    for folder in folders:
        predictor = load_predictor(folder)
        key = predictor.name if predictor.name not in found else f"{predictor.name}@{Path(folder).resolve().name}"
        if key in found:
            raise ConfigurationError(f"--predictor_dir {folder}: '{key}' was given before; rename one of the folders")
        found[key] = predictor
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises ConfigurationError when it is missing or damaged."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path}: missing or damaged ({error}); train the predictor again") from error


def _missing_column(column: str) -> str:
    if column == "tokens":
        return "the column 'tokens', but neither token ids nor token strings are known; collect the traces again"
    flags = {"weights": "weights", "logits": "weights,logits", "lookahead": "weights,lookahead --lookahead 3"}
    return f"the column '{column}', which these traces lack; collect them again with --store {flags[column]}"
