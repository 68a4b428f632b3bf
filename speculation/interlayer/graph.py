"""A lane on a GPU: each layer's step as one CUDA graph, since launching its many small kernels takes longest there."""

from __future__ import annotations

import torch
from torch import Tensor

from speculation.interlayer.lane import Lane
from speculation.interlayer.network import InterLayerNetwork


class GraphedLane(Lane):
    """A lane that scores while it observes, without waiting for the GPU; `scores` waits, and copies them to the CPU.

    Attention always looks at the whole window, where places not in use weigh nothing, so every token costs the same.
    What is asked before a sequence's first choice is computed without a graph. Graphs are recorded when the lane is
    made, and hold its buffers and the network's weights of then. On a CPU the same steps are computed as they are.
    """

    @torch.inference_mode()
    def __init__(self, network: InterLayerNetwork, horizon: int, top_k: int) -> None:
        super().__init__(network, horizon)
        self.ids_K = torch.arange(top_k, device=self.device)
        self.weights_K = torch.zeros(top_k, device=self.device)
        self.out_E = torch.zeros(network.num_experts, device=self.device)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        if self.device.type == "cuda":
            self._record()

    @torch.inference_mode()
    def observe(self, ids_K: Tensor, weights_K: Tensor | None) -> None:
        """Takes the choice at the next layer in decoding order, and starts on the scores that follow from it."""
        if self.pending:
            self._remember(self.steps[self._target()])
        self.ids_K.copy_(ids_K, non_blocking=True)
        if weights_K is None:
            self.weights_K.zero_()
        else:
            self.weights_K.copy_(weights_K, non_blocking=True)
        if self.graphs:
            self.graphs[self.next_layer].replay()
        else:
            self.compute(self.next_layer)
        self.next_layer, self.pending = (self.next_layer + 1) % self.layers, False

    @torch.inference_mode()
    def scores(self) -> Tensor:
        """Scores (E,), on the CPU, of the step h after the last one observed."""
        if self.pending:
            self.out_E.copy_(self._score(self.steps[self._target()]))
            self.pending = False
        return self.out_E.clone() if self.device.type == "cpu" else self.out_E.cpu()

    def _in_use(self, later: int) -> int:
        return self.window

    def compute(self, layer: int) -> None:
        """From the choice in `ids_K` and `weights_K` at a layer to the scores in `out_E`."""
        self._take(layer, self.ids_K, self.weights_K)
        self.out_E.copy_(self._score(self.steps[(layer + self.horizon) % self.layers]))

    def _record(self) -> None:
        """One graph per layer; they share their temporary memory, as nothing but the lane's buffers outlives one."""
        with torch.cuda.device(self.device), torch.autocast("cuda", enabled=False):
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries must have set themselves up before recording
                for layer in range(self.layers):
                    self.compute(layer)
            torch.cuda.current_stream().wait_stream(stream)
            for layer in range(self.layers):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self.compute(layer)
                self.graphs.append(graph)
        self.reset()
