"""How long things take, in whole nanoseconds: a model on a machine.

One decode step reads weights faster than it computes with them unless many sequences share it, so each part takes the
longer of reading its bytes and doing its multiplications (the roofline of Williams, Waterman and Patterson 2009). What
a layer costs beside that is counted before its router; reading the KV cache is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.model import ModelProfile


@dataclass(frozen=True)
class Timing:
    """Times in ns, by A sequences at once (0 to the batch size) and number of different experts that a layer runs."""

    expert_bytes: int
    transfer_ns: int
    read_ns: int
    attention_ns_A: NDArray[np.int64]
    experts_ns_AE: NDArray[np.int64]
    other_ns_A: NDArray[np.int64]

    @classmethod
    def of(cls, model: ModelProfile, hardware: HardwareProfile, precision: str | None, batch_size: int) -> Timing:
        """Return the times of a model on a machine; raises ConfigurationError for an unknown precision."""
        expert_bytes = model.expert_bytes(precision)
        active_A = np.arange(batch_size + 1)
        needed_E = np.arange(model.num_experts + 1)

        def part(size: float | NDArray[np.int64], parameters: int) -> NDArray[np.float64]:
            reading = np.asarray(size) / hardware.memory_bytes_per_s
            computing = 2 * parameters * active_A / hardware.operations_per_s
            return np.maximum(reading, computing if np.ndim(size) == 0 else computing[:, None])

        other = model.other_parameters - model.embedding_parameters
        return cls(
            expert_bytes=expert_bytes,
            transfer_ns=_ns(hardware.link_latency_s + expert_bytes / hardware.link_bytes_per_s),
            read_ns=_ns(hardware.disk_latency_s + expert_bytes / hardware.disk_bytes_per_s),
            attention_ns_A=_all_ns(hardware.layer_overhead_s + part(model.layer_read_bytes(), model.layer_parameters)),
            experts_ns_AE=_all_ns(part(needed_E * expert_bytes, model.top_k * model.expert_parameters)),
            other_ns_A=_all_ns(part(model.other_read_bytes(), other)),
        )

    def with_link(self, factor: float) -> Timing:
        """Return the same with a link that many times as fast."""
        return replace(self, transfer_ns=round(self.transfer_ns / factor))

    def resident_ns(self, layers: int, top_k: int) -> int:
        """Return how long a token of a single sequence takes where every expert is there."""
        layer_ns = int(self.attention_ns_A[1] + self.experts_ns_AE[1, top_k])
        return layers * layer_ns + int(self.other_ns_A[1])


def _ns(seconds: float) -> int:
    return max(1, round(seconds * 1e9))


def _all_ns(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(seconds * 1e9).astype(np.int64)
