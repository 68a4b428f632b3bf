"""Steps as they are recorded for a GPU: the same operations in the same places, replayed, give the batch scores."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speculation import RoutingBatch
from speculation.interlayer.graph import GraphedLane
from speculation.interlayer.lane import Lane
from speculation.interlayer.live import InterLayerLive
from speculation.interlayer.predictor import InterLayer
from speculation.predictor import RoutingShape

SHAPE = RoutingShape(5, 8, 2)
TOKENS = 10
TOLERANCE = 1e-4
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PARTS: list[dict[str, Any]] = [
    {},
    {"tokens": True, "path_size": 8, "window": 4, "reach": 2},
    {"weights": False, "copy_heads": 1, "window": 1, "reach": 5},
    {"copy_heads": 0, "context_size": 0, "tokens": True},
]


def untrained(options: Mapping[str, Any], shape: RoutingShape = SHAPE) -> InterLayer:
    """A predictor whose weights are random, those that start at zero too."""
    small = {"hidden_size": 16, "mlp_size": 16, "copy_key_size": 8, "context_size": 16, "window": 32}
    predictor = InterLayer(**{**small, **options})
    predictor.shape_ = shape
    predictor.module_ = predictor.build(shape, torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.module_.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return predictor


def routing(options: Mapping[str, Any], shape: RoutingShape = SHAPE, seed: int = 2) -> RoutingBatch:
    """One sequence of random choices, with the columns that options let a predictor see."""
    generator = torch.Generator().manual_seed(seed)
    size = TOKENS, shape.num_layers
    draw = torch.rand(*size, shape.num_experts, generator=generator)
    weights = torch.rand(*size, shape.top_k, generator=generator) if options.get("weights", True) else None
    ids = torch.randint(0, 999, (TOKENS,), generator=generator) if options.get("tokens") else None
    chosen = draw.argsort(dim=2)[:, :, : shape.top_k]
    return RoutingBatch(chosen, weights, None, None, ids, torch.tensor([0, TOKENS]), shape.num_experts)


def decode(
    lane: Lane, batch: RoutingBatch, asked: Callable[[int], bool] = lambda step: True
) -> dict[int, torch.Tensor]:
    """The scores asked for, by the step that they are of, while the batch's one sequence is decoded."""
    found, layers = {}, batch.num_layers
    for step in range(batch.num_tokens * layers):
        token, layer = divmod(step, layers)
        if layer == 0:
            lane.begin_token(None if batch.token_ids_T is None else int(batch.token_ids_T[token]))
        if asked(step):
            found[step + lane.horizon - 1] = lane.scores()
        weights_TLK = batch.routing_weights_TLK
        lane.observe(batch.expert_ids_TLK[token, layer], None if weights_TLK is None else weights_TLK[token, layer])
    return found


def assert_equal_to_batch(
    found: Mapping[int, torch.Tensor], predictor: InterLayer, batch: RoutingBatch, h: int
) -> None:
    expected = predictor.predict_scores(batch, h).flatten(0, 1)
    within = [step for step in found if step < len(expected)]
    assert len(within) >= len(found) - h + 1
    torch.testing.assert_close(
        torch.stack([found[step] for step in within]), expected[within], atol=TOLERANCE, rtol=TOLERANCE
    )


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: operations are noted once, then done again on the same memory without Python.

    Reading a value back to the host, or bringing one from there, can not be recorded.
    """

    FORBIDDEN = re.compile(
        r"aten\.(item|_local_scalar_dense|nonzero|index\.|index_put|lift_fresh|cpu|cuda|to\.(?!dtype$))"
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not self.FORBIDDEN.match(str(func)), f"{func} can not be recorded"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
            for place, value in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if place.untyped_storage().data_ptr() not in given:  # else a view, or written in place
                    place.copy_(value)

    def signature(self) -> list[Any]:
        """Every operation with the shapes and places of its arguments."""
        return [
            (str(func), [_layout(each) for each in tree_leaves((args, kwargs))])
            for func, args, kwargs, _ in self.operations
        ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _layout(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.storage_offset()) if _is_tensor(value) else value


class Recorded(GraphedLane):
    """A lane on a CPU that replays recordings as one on a GPU replays graphs."""

    @classmethod
    def of(cls, predictor: InterLayer, horizon: int) -> Self:
        lane = cls(predictor.network, horizon, SHAPE.top_k)
        with torch.inference_mode():
            lane.graphs = [lane.recording(layer) for layer in range(lane.layers)]  # type: ignore[misc]
        lane.reset()
        return lane

    def recording(self, layer: int) -> Recording:
        with Recording() as recording:
            self.compute(layer)
        return recording


@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("options", PARTS)
def test_recorded_steps_replayed_give_the_batch_scores(options: dict[str, Any], horizon: int) -> None:
    predictor, batch = untrained(options), routing(options)
    assert_equal_to_batch(decode(Recorded.of(predictor, horizon), batch), predictor, batch, horizon)


def test_recorded_steps_do_without_weights_and_token_ids_that_the_network_could_use() -> None:
    predictor, batch = untrained({"tokens": True}), routing({"weights": False})
    assert predictor.uses == {"weights", "tokens"}
    assert_equal_to_batch(decode(Recorded.of(predictor, 2), batch), predictor, batch, 2)


def test_recorded_steps_know_neither_token_nor_host() -> None:
    """At every token a layer's step is the same operations on the same places."""
    options = PARTS[1]
    lane, batch = Recorded(untrained(options).network, 2, SHAPE.top_k), routing(options)
    with torch.inference_mode():
        first = [lane.recording(layer).signature() for layer in range(lane.layers)]
        decode(lane, batch)
        assert [lane.recording(layer).signature() for layer in range(lane.layers)] == first


@pytest.mark.parametrize(
    "waits",
    [
        lambda values: values.sum().item(),
        lambda values: values.to("cpu"),
        lambda values: values.cpu(),
        lambda values: values[values > 0],
        lambda values: values + torch.tensor(1.0),
    ],
)
def test_a_recording_refuses_what_a_graph_can_not_hold(waits: Callable[[torch.Tensor], Any]) -> None:
    values = torch.ones(3)
    with torch.inference_mode(), pytest.raises(AssertionError, match="can not be recorded"), Recording():
        waits(values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [RoutingShape(1, 4, 1), RoutingShape(3, 8, 2), RoutingShape(7, 8, 8)], ids=str)
def test_lanes_with_and_without_graphs_give_the_batch_scores(shape: RoutingShape, device: str) -> None:
    batch = routing({}, shape)
    predictor = untrained({"path_size": 8}, shape).to(device)
    for horizon in range(1, min(shape.num_layers, 3) + 1):
        lanes = [Lane(predictor.network, horizon), GraphedLane(predictor.network, horizon, shape.top_k)]
        for lane in lanes:
            assert_equal_to_batch(decode(lane, batch), predictor, batch, horizon)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graphed", [False, True])
def test_scores_asked_for_now_and_then_are_the_same(graphed: bool, device: str) -> None:
    predictor, batch = untrained({"window": 4}).to(device), routing({})
    for horizon in (1, 3):
        network = predictor.network
        lane = GraphedLane(network, horizon, SHAPE.top_k) if graphed else Lane(network, horizon)
        found = decode(lane, batch, asked=lambda step: step % 4 == 3)
        assert len(found) == TOKENS * 5 // 4
        assert_equal_to_batch(found, predictor, batch, horizon)


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_that_begins_another_sequence_has_forgotten_the_one_before(device: str) -> None:
    options = {"tokens": True, "path_size": 8, "window": 8}
    predictor = untrained(options).to(device)
    state = predictor.start()
    assert isinstance(state, InterLayerLive)
    for batch in (routing(options, seed=3), routing(options, seed=4)):
        lanes = dict(state.lanes)
        state.restart()
        expected = predictor.predict_scores(batch, 2).flatten(0, 1)
        for token, layer in torch.cartesian_prod(torch.arange(TOKENS), torch.arange(5)).tolist():
            if layer == 0:
                state.begin_token(int(batch.token_ids_T[token]))
            found = predictor.predict_next(state, 2)
            if token * 5 + layer + 1 < len(expected):
                target = expected[token * 5 + layer + 1]
                torch.testing.assert_close(found, target, atol=TOLERANCE, rtol=TOLERANCE)
            state.observe(batch.expert_ids_TLK[token, layer], batch.routing_weights_TLK[token, layer])
        assert all(state.lanes[horizon] is lane for horizon, lane in lanes.items())
    assert all(isinstance(lane, GraphedLane) == (device == "cuda") for lane in state.lanes.values())
    assert state.num_steps == TOKENS * 5
