"""How long tracing takes with the whole model in memory, and with one layer of it at a time: from rates, by arithmetic.

While a layer computes, the next one is read and made ready, so of the two the longer one counts. What is left out:
writing hidden states and shards, which other threads do, and whatever reading and computing take from each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

JOINED = 2 / 3
"""Of a layer's bytes: the gates and ups of all experts, which are in memory twice while they are joined unquantised."""


@dataclass(frozen=True)
class Rates:
    """What a machine does with one model; measured, or assumed from a profile."""

    disk_bytes_per_s: float
    """Of a checkpoint's bytes that are not in the page cache."""
    ready_s_per_byte: float
    """Copying to the device, joining and quantising, for each byte of the checkpoint."""
    token_layer_s: float
    """A token, padding included, in one layer."""

    def read_s(self, size: int, cached: bool = False) -> float:
        """Return the seconds until so many bytes of a checkpoint are on the device and usable."""
        return size * (self.ready_s_per_byte + (0 if cached else 1 / self.disk_bytes_per_s))


def resident_seconds(read: int, tokens: int, layers: int, rates: Rates) -> tuple[float, float]:
    """Return the seconds of loading `read` bytes, and of taking the tokens through all layers."""
    return rates.read_s(read), tokens * layers * rates.token_layer_s


def streamed_seconds(
    outside: int, layers: Sequence[int], passes: Iterable[int], rates: Rates, cached: bool, traced: int | None = None
) -> tuple[float, float]:
    """Return the seconds of the start, which reads every layer once, and of passes of so many tokens each.

    `outside` and `layers` are bytes of the checkpoint; passes take the first `traced` layers, all when not given.
    `cached` says that the page cache holds the checkpoint after the start.
    """
    ready = [rates.read_s(size, cached) for size in layers[:traced]]
    total = 0.0
    for tokens in passes:
        computing = tokens * rates.token_layer_s
        total += ready[0] + sum(max(computing, each) for each in ready[1:]) + computing
    return rates.read_s(outside) + sum(rates.read_s(size) for size in layers), total
