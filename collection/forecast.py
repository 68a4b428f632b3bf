"""What each execution of a run needs of the machine, and how long it takes where rates were measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from collection.batching import SMALLEST_PRESET
from collection.passes import BLOCK_TOKENS, SHARE_FOR_STATES, cut_passes
from collection.plan import Layout
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from groundwork.hardware import free_memory_bytes
from groundwork.profiles.execution import JOINED, Rates, resident_seconds, streamed_seconds
from moe import quantize
from moe.footprint import footprint
from moe.foresight import SHARE_FOR_WEIGHTS, Loading, TooLargeError, foresee_loading
from traces.plan import PlannedShard, estimated_bytes_per_token
from traces.schema import TraceSpec, decoded_bytes_per_token

_BLOCKS = 4  # on their way between memory and disk


@dataclass(frozen=True)
class Possible:
    """How a model would be loaded in one execution, and why that can not be, None where it can."""

    loading: Loading
    refusal: ConfigurationError | None


def possible_executions(settings: CollectSettings) -> dict[str, Possible]:
    """Return by name what each execution would be; raises ConfigurationError for what concerns both."""
    return {execution: _possible(settings, execution) for execution in ("resident", "streamed")}


def foresee(settings: CollectSettings, execution: str) -> Loading:
    """Return how the model would be loaded; raises ConfigurationError as `foresee_loading` does."""
    return foresee_loading(
        settings.model,
        device=settings.first_device if execution == "streamed" else settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        attn_implementation=settings.attn_implementation,
        experts_implementation=settings.experts_implementation,
        streamed=execution == "streamed",
    )


def choose_execution(possible: dict[str, Possible]) -> str:
    """Return resident where the model, quantised as asked for, takes nine tenths of the free memory at most, or where
    it alone is possible; else streamed. Raises ConfigurationError where neither is possible.
    """
    resident, streamed = possible["resident"], possible["streamed"]
    roomy = resident.loading.needed <= SHARE_FOR_WEIGHTS * resident.loading.free
    if resident.refusal is None and (roomy or streamed.refusal is not None):
        return "resident"
    if isinstance(streamed.refusal, TooLargeError):
        raise streamed.refusal
    if resident.refusal is not None and streamed.refusal is not None:  # it is other options that forbid streaming
        raise resident.refusal
    return "streamed"


class Forecast:
    """Bytes and, with `rates` that were measured in `mode`, seconds that a run takes in each execution."""

    def __init__(
        self,
        settings: CollectSettings,
        possible: dict[str, Possible],
        layout: Layout,
        spec: TraceSpec,
        rates: Rates | None = None,
        mode: str | None = None,
    ) -> None:
        self._settings, self._possible, self._layout, self._spec = settings, possible, layout, spec
        self._rates, self._mode = rates, mode
        self._sizes = {name: footprint(each.loading, settings.dtype) for name, each in possible.items()}

    def facts(self) -> dict[str, Any]:
        """Return by execution: whether it is possible, memory, disk, bytes read, and seconds, as JSON-ready values.

        `refusal` says why it is not possible, else it is None. `device_bytes` are None on a CPU, whose memory is the
        host's; seconds are None where nothing was measured, or that can not be run.
        """
        return {name: self._facts(name) for name in self._possible}

    def seconds(self, execution: str, shards: Iterable[PlannedShard]) -> tuple[float, float] | None:
        """Return the seconds until the model is ready, and of tracing these shards; None where they are not known."""
        possible, sizes = self._possible[execution], self._sizes[execution]
        if self._rates is None or possible.loading.mode != self._mode:
            return None
        padded = 1 / (1 - self._layout.padding_share)
        if execution == "resident":
            tokens = sum(shard.num_tokens for shard in shards) * padded
            read = sizes.outside + sum(sizes.layers)
            return resident_seconds(read, round(tokens), len(sizes.layers), self._rates)
        passes = [round(tokens * padded) for tokens in self._passes(shards)]
        traced = sizes.last_moe_layer + 1
        return streamed_seconds(sizes.outside, sizes.layers, passes, self._rates, self._is_cached(), traced)

    def _facts(self, execution: str) -> dict[str, Any]:
        possible, sizes = self._possible[execution], self._sizes[execution]
        device, host = self._memory(execution)
        tokens = sum(self._layout.num_tokens_S)
        disk = tokens * estimated_bytes_per_token(self._spec)
        to_start, passes = sizes.outside + sum(sizes.layers), self._passes(self._layout.shards)
        read = to_start
        if execution == "streamed":
            disk += 2 * max(passes) * (sizes.state + decoded_bytes_per_token(self._spec))
            read += len(passes) * sum(sizes.layers[: sizes.last_moe_layer + 1])
        seconds = self.seconds(execution, self._layout.shards) if possible.refusal is None else None
        return {
            "possible": possible.refusal is None,
            "refusal": possible.refusal and str(possible.refusal),
            "quantization": possible.loading.mode,
            "device_bytes": None if possible.loading.device.type == "cpu" else device,
            "host_bytes": device + host if possible.loading.device.type == "cpu" else host,
            "disk_bytes": round(disk),
            "read_bytes": read,
            "read_bytes_to_start": to_start,
            "passes": len(passes) if execution == "streamed" else 1,
            "seconds": seconds and sum(seconds),
            "seconds_to_start": seconds and seconds[0],
            "seconds_per_million_tokens": seconds and seconds[1] / tokens * 1e6,
        }

    def _memory(self, execution: str) -> tuple[int, int]:
        """Return the bytes beside the model's weights, and these, on the device, and those in host memory."""
        sizes, loading = self._sizes[execution], self._possible[execution].loading
        batch = self._settings.batch_tokens or self._largest_batch()
        joined = 0 if quantize.is_ours(loading.mode) else round(JOINED * max(sizes.layers))
        device = loading.needed + joined + batch * sizes.activations
        if execution == "resident":
            return device, max(sizes.layers)  # of the mapped checkpoint, which the system may take back
        largest = max(self._passes(self._layout.shards)) * sizes.state
        blocks = _BLOCKS * BLOCK_TOKENS * (sizes.state + decoded_bytes_per_token(self._spec))
        return device, min(largest, self._budget()) + min(blocks, 2 * largest)

    def _budget(self) -> int:
        given = self._settings.memory_budget_gb
        free = free_memory_bytes(torch.device("cpu"))
        return int(SHARE_FOR_STATES * free if given is None else given * 1e9)

    def _is_cached(self) -> bool:
        """Say whether the page cache can hold the whole checkpoint beside what the run takes."""
        sizes = self._sizes["streamed"]
        device, host = self._memory("streamed")
        taken = device + host if self._possible["streamed"].loading.device.type == "cpu" else host
        return sum(sizes.layers) <= free_memory_bytes(torch.device("cpu")) - taken

    def _passes(self, shards: Iterable[PlannedShard]) -> list[int]:
        cut = cut_passes(shards, self._settings.pass_tokens)
        return [sum(shard.num_tokens for shard in each) for each in cut]

    def _largest_batch(self) -> int:
        lengths = self._layout.num_tokens_S
        sizes = (len(batch) * max(lengths[each] for each in batch) for batch in self._layout.batches)
        return max(sizes, default=SMALLEST_PRESET)


def _possible(settings: CollectSettings, execution: str) -> Possible:
    refusal: ConfigurationError | None = None
    try:
        loading = foresee(settings, execution)
    except TooLargeError as error:
        loading, refusal = error.loading, error
    return Possible(loading, settings.refusal_of(execution) or refusal)
