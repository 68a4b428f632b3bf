"""InterLayer in live use: the record of a sequence beside lanes of running sums, equal to the batch scores."""

from __future__ import annotations

from torch import Tensor

from speculation.interlayer.graph import GraphedLane
from speculation.interlayer.lane import Lane
from speculation.interlayer.network import InterLayerNetwork
from speculation.live import LiveState
from speculation.predictor import RoutingShape


class InterLayerLive(LiveState):
    """The record of a sequence, and a lane for each horizon asked for; on a GPU lanes replay CUDA graphs.

    `graphs` False computes without graphs there. A state holds for the weights and the device that the network has
    when a lane is made.
    """

    def __init__(self, shape: RoutingShape, network: InterLayerNetwork, graphs: bool = True) -> None:
        super().__init__(shape)
        self.network = network
        self.graphs = graphs and network.bias_LE.is_cuda
        self.lanes: dict[int, Lane] = {}

    def restart(self) -> None:
        """Begins another sequence with the lanes that are there: recording graphs takes longer than a token."""
        super().__init__(self.shape)
        for lane in self.lanes.values():
            lane.reset()

    def begin_token(self, token_id: int | None = None) -> None:
        super().begin_token(token_id)
        for lane in self.lanes.values():
            lane.begin_token(token_id)

    def _observed(self) -> None:
        for lane in self.lanes.values():
            self._feed(lane, self.num_steps - 1)

    def scores(self, horizon: int) -> Tensor:
        """Scores (E,) for the step `horizon` after the last observed; a horizon's first call replays the sequence."""
        if horizon not in self.lanes:
            self.lanes[horizon] = self._caught_up(horizon)
        return self.lanes[horizon].scores()

    def _caught_up(self, horizon: int) -> Lane:
        lane = GraphedLane(self.network, horizon, self.shape.top_k) if self.graphs else Lane(self.network, horizon)
        for token, token_id in enumerate(self.token_ids):
            lane.begin_token(token_id)
            first = token * self.shape.num_layers
            for step in range(first, min(first + self.shape.num_layers, self.num_steps)):
                self._feed(lane, step)
        return lane

    def _feed(self, lane: Lane, step: int) -> None:
        lane.observe(self.expert_ids[step], self.routing_weights[step] if self.routing_weights else None)
