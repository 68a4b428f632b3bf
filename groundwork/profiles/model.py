"""A mixture-of-experts model as a simulation sees it: how many bytes stay, and how many an expert is."""

import math
from dataclasses import dataclass, field

from groundwork.errors import ConfigurationError

_COUNTS = ("moe_layers", "num_experts", "top_k", "expert_parameters", "layer_parameters", "other_parameters")


@dataclass(frozen=True)
class ModelProfile:
    """Shape and parameter counts of one model; tied parameters count once.

    Raises ConfigurationError for counts that no model has.
    """

    name: str
    source: str
    """Where the counts come from, and how."""
    moe_layers: int
    """L: layers with routed experts."""
    num_experts: int
    """E: routed experts of each of them."""
    top_k: int
    """K: experts that a token is routed to."""
    expert_parameters: int
    """Of one expert, biases included."""
    layer_parameters: int
    """Of one MoE layer without its routed experts: attention, router, norms, shared experts; read for every token."""
    other_parameters: int
    """Embeddings, dense layers, the last norm and the head."""
    embedding_parameters: int
    """Those of `other_parameters` that stay in memory but are not read: of the embeddings a token needs one row.

    0 where the head is tied to them, for then they are read as the head.
    """
    precisions: dict[str, float] = field(hash=False)
    """Name -> bytes per expert parameter, scales and unquantised biases included."""
    default_precision: str
    """The one that the published checkpoint has."""
    names: tuple[str, ...] = ()
    """What else traces call this model: hub ids and the like."""
    resident_bytes_per_parameter: float = 2.0
    """Of everything but routed experts."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise self._error(f"{name} is {getattr(self, name)}; give it a whole number above 0")
        if self.top_k > self.num_experts:
            raise self._error(f"top_k is {self.top_k} of {self.num_experts} experts; give it at most num_experts")
        if not 0 <= self.embedding_parameters <= self.other_parameters:
            raise self._error(
                f"embedding_parameters is {self.embedding_parameters}, and other_parameters, which hold them, "
                f"{self.other_parameters}; give it a number from 0 to that"
            )
        sizes = {**self.precisions, "resident_bytes_per_parameter": self.resident_bytes_per_parameter}
        for name, size in sizes.items():
            if not math.isfinite(size) or size <= 0:
                raise self._error(f"{name} is {size:g} bytes per parameter; give it a finite number above 0")
        self.expert_bytes()

    @property
    def total_parameters(self) -> int:
        experts = self.num_experts * self.expert_parameters
        return self.moe_layers * (experts + self.layer_parameters) + self.other_parameters

    def expert_bytes(self, precision: str | None = None) -> int:
        """Return the bytes of one expert; raises ConfigurationError for a precision that the profile does not have."""
        wanted = precision or self.default_precision
        if wanted not in self.precisions:
            raise self._error(f"precision {wanted!r} is not in it; use one of {', '.join(self.precisions) or 'none'}")
        return round(self.expert_parameters * self.precisions[wanted])

    def resident_bytes(self) -> int:
        """Return the bytes of everything but routed experts: what stays in GPU memory."""
        return self._stored(self.moe_layers * self.layer_parameters + self.other_parameters)

    def layer_read_bytes(self) -> int:
        """Return the bytes that a token reads in one MoE layer beside its routed experts."""
        return self._stored(self.layer_parameters)

    def other_read_bytes(self) -> int:
        """Return the bytes that a token reads outside the MoE layers: dense layers, the last norm, the head."""
        return self._stored(self.other_parameters - self.embedding_parameters)

    def _stored(self, parameters: int) -> int:
        return round(parameters * self.resident_bytes_per_parameter)

    def _error(self, what: str) -> ConfigurationError:
        return ConfigurationError(f"model profile {self.name!r}: {what}")
