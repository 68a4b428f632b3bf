"""activation_lookup: find the known request whose expert use is most like this one's so far, and expect the same.

The idea is that of MoE-Infinity (2401.14361): trace each request as one matrix of how often every layer used every
expert, keep a bounded collection of representative matrices, match the running request's partial matrix by cosine
distance, and prefetch what the nearest one uses in the layers ahead. The paper publishes latencies and no recall;
MoE-Beyond (2508.17137) reports 17 % cache hits for it on DeepSeek-V2-Lite with a tenth of the experts cached.

Ours keeps the centroids of a k-means over unit-length matrices of the training requests (at most `capacity`, from a
reservoir of `max_requests`), matches anew at every step with all routing that the horizon allows, and mixes 1 % of the
mean matrix into each, which orders experts that a cluster never used. The original plans for a whole iteration ahead
rather than a token, so what it names is the best that request-level evidence gives; nothing was taken from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from groundwork.errors import ConfigurationError
from groundwork.progress import progress
from speculation.features import RoutingBatch
from speculation.predictor import Predictor, RoutingShape, register
from traces.reader import TraceDataset

CHUNK_TOKENS = 256  # of a sequence matched at once
MEAN_SHARE = 0.01


@register
class ActivationLookup(Predictor):
    """The nearest representative's use of a layer; a sequence's first steps, still without evidence, get the mean's."""

    name = "activation_lookup"
    score_scale = "shares"

    def __init__(self, capacity: int = 128, max_requests: int = 4096) -> None:
        super().__init__()
        if not 1 <= capacity <= max_requests:
            raise ConfigurationError(f"capacity {capacity}: must be 1 to max_requests {max_requests}")
        self.capacity, self.max_requests = capacity, max_requests

    def options(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "max_requests": self.max_requests}

    def fit(self, dataset: TraceDataset, *, split: str = "train", hold_out: Collection[str] = ()) -> Self:
        """Clusters the split's requests; raises ConfigurationError when it holds none."""
        self.check_columns(dataset, "the traces")
        shape = RoutingShape.of(dataset)
        generator = np.random.default_rng(0)
        kept: list[np.ndarray[Any, Any]] = []
        mean_X = np.zeros(shape.num_layers * shape.num_experts)
        seen = 0
        stream = dataset.sequences(split=split, columns=(), hold_out=tuple(hold_out))
        for sequence in progress(stream, description=f"matrices of {split}", unit="requests"):
            matrix_X = _activation(sequence.expert_ids_TLK, shape)
            mean_X += matrix_X
            seen += 1
            place = seen - 1 if len(kept) < self.max_requests else int(generator.integers(seen))
            if place == len(kept):
                kept.append(matrix_X)
            elif place < self.max_requests:
                kept[place] = matrix_X
        if not kept:
            raise ConfigurationError(f"the traces hold no sequence of split {split} to match with; collect more")
        mean_X = mean_X / seen
        found_NX = np.stack(kept)
        if len(found_NX) > self.capacity:
            unit_NX = found_NX / np.linalg.norm(found_NX, axis=1, keepdims=True)
            groups = KMeans(self.capacity, n_init=1, random_state=0).fit_predict(unit_NX)
            found_NX = np.stack([found_NX[groups == group].mean(axis=0) for group in np.unique(groups)])
        mixed_NX = np.concatenate([(1 - MEAN_SHARE) * found_NX + MEAN_SHARE * mean_X, mean_X[None]])
        self.shape_ = shape
        # The last one is the mean of all requests.
        self.matrices_NLE_ = torch.from_numpy(mixed_NX).float().view(-1, shape.num_layers, shape.num_experts)
        return self

    def predict_scores(self, batch: RoutingBatch, horizon: int = 1) -> Tensor:
        self.check_horizon(batch, horizon)
        tokens, layers, _ = batch.expert_ids_TLK.shape
        known_NLE = self.matrices_NLE_[:-1]
        unit_LEN = (known_NLE / known_NLE.flatten(1).norm(dim=1)[:, None, None]).permute(1, 2, 0).double().contiguous()
        scores_TLE = torch.empty(tokens, layers, batch.num_experts)
        layer_L = torch.arange(layers)
        for start, stop in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
            # The last `horizon` steps' evidence so far, (h, N): what the next chunk's first steps go by.
            held_HN = torch.zeros(horizon, len(known_NLE), dtype=torch.float64)
            for first in range(start, stop, CHUNK_TOKENS):
                ids_CLK = batch.expert_ids_TLK[first : min(first + CHUNK_TOKENS, stop)]
                # The cosine's other factor, the partial matrix's own length, is the same for all it is compared with.
                gained_CLN = torch.stack(
                    [F.embedding_bag(ids_CLK[:, layer], unit_LEN[layer], mode="sum") for layer in range(layers)], dim=1
                )
                total_SN = held_HN[-1] + gained_CLN.flatten(0, 1).cumsum(dim=0)
                total_SN = torch.cat([held_HN, total_SN])
                held_HN = total_SN[-horizon:]
                nearest_S = total_SN[:-horizon].argmax(dim=1)
                if first == start:
                    nearest_S[:horizon] = len(known_NLE)
                nearest_CL = nearest_S.view(len(ids_CLK), layers)
                scores_TLE[first : first + len(ids_CLK)] = self.matrices_NLE_[nearest_CL, layer_L]
        return scores_TLE

    def state(self) -> dict[str, Tensor]:
        return {"matrices_NLE": self.matrices_NLE_}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.matrices_NLE_ = state["matrices_NLE"]


def _activation(expert_ids_TLK: np.ndarray[Any, Any], shape: RoutingShape) -> np.ndarray[Any, Any]:
    """A request's matrix, flattened: each layer's share of selections by expert, so that its length does not matter."""
    layers, experts = shape.num_layers, shape.num_experts
    cells = expert_ids_TLK.astype(np.int64) + np.arange(layers)[:, None] * experts
    counts_X = np.bincount(cells.ravel(), minlength=layers * experts)
    return counts_X / (len(expert_ids_TLK) * shape.top_k)
