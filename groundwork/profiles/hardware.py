"""A machine as a simulation sees it: how fast it computes and copies, and how much fits where."""

from dataclasses import dataclass
from typing import NamedTuple

from groundwork.errors import ConfigurationError

_ABOVE_ZERO = ("gpu_memory_gb", "memory_gb_s", "compute_tflops", "link_gb_s", "disk_gb_s", "ram_gb")
# What lies outside is a slip, and simulated nanoseconds might not fit into 64 bits.
_LEAST, _LEAST_TFLOPS, _MOST, _MOST_US = 1e-3, 1e-6, 1e9, 1e6
_NOT_NEGATIVE = ("layer_overhead_us", "link_latency_us", "disk_latency_us", "reserved_gb")


class Channel(NamedTuple):
    """A way for bytes: so many a second, and `latency_s` for each transfer beside."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class HardwareProfile:
    """One GPU with its host: rates that programs reach, not those of data sheets; GB are 10^9 bytes.

    The fields have the units that people quote, the properties bytes, seconds and operations. Raises
    ConfigurationError for a value that no machine has.
    """

    name: str
    source: str
    """Where each number comes from, and which of them are assumptions."""
    gpu_memory_gb: float
    memory_gb_s: float
    """What decoding reads from GPU memory: the data sheet's bandwidth times what is reached of it."""
    compute_tflops: float
    """Dense products of 16-bit matrices."""
    layer_overhead_us: float
    """What one transformer layer takes for one token beyond reading its weights: launches, attention, small kernels."""
    link_gb_s: float
    """Copies from pinned host memory to the GPU."""
    link_latency_us: float
    """Per copy."""
    disk_gb_s: float
    """Reads of a whole expert, not in the page cache."""
    disk_latency_us: float
    """Per read."""
    ram_gb: float
    reserved_gb: float
    """GPU memory that neither weights nor experts may take: the CUDA context, the KV cache, work space."""

    def __post_init__(self) -> None:
        for field in (*_ABOVE_ZERO, *_NOT_NEGATIVE):
            value = getattr(self, field)
            least, most = (_LEAST, _MOST) if field in _ABOVE_ZERO else (0, _MOST_US)
            least = _LEAST_TFLOPS if field == "compute_tflops" else least  # a busy CPU's tiny products reach little
            if not least <= value <= most:
                raise ConfigurationError(
                    f"hardware profile {self.name!r}: {field} is {value:g}; give it a number from {least:g} to {most:g}"
                )
        if self.reserved_gb >= self.gpu_memory_gb:
            raise ConfigurationError(
                f"hardware profile {self.name!r}: reserved_gb is {self.reserved_gb:g} of {self.gpu_memory_gb:g} GB of "
                "GPU memory, which leaves nothing for weights; lower it"
            )

    @property
    def gpu_memory_bytes(self) -> int:
        return round(self.gpu_memory_gb * 1e9)

    @property
    def reserved_bytes(self) -> int:
        return round(self.reserved_gb * 1e9)

    @property
    def ram_bytes(self) -> int:
        return round(self.ram_gb * 1e9)

    @property
    def memory_bytes_per_s(self) -> float:
        return self.memory_gb_s * 1e9

    @property
    def operations_per_s(self) -> float:
        """A multiplication and an addition are two."""
        return self.compute_tflops * 1e12

    @property
    def layer_overhead_s(self) -> float:
        return self.layer_overhead_us * 1e-6

    @property
    def link_bytes_per_s(self) -> float:
        return self.link_gb_s * 1e9

    @property
    def link_latency_s(self) -> float:
        return self.link_latency_us * 1e-6

    @property
    def disk_bytes_per_s(self) -> float:
        return self.disk_gb_s * 1e9

    @property
    def disk_latency_s(self) -> float:
        return self.disk_latency_us * 1e-6
