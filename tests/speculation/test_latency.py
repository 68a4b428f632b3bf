"""What live predictions cost: each is made before its choice is observed, and only those after the start are timed."""

import time

import pytest
import torch
from torch import Tensor

from speculation import RoutingBatch, create
from speculation.counted import Frequency
from speculation.latency import decode_timed
from speculation.live import LiveState
from traces.reader import TraceDataset


class Recorder(Frequency):
    """Writes down what happens to its state, and computes for `busy_s` before each prediction."""

    busy_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.state: LiveState | None = None

    def start(self) -> LiveState:
        recorder = self

        class Recorded(LiveState):
            def begin_token(self, token_id: int | None = None) -> None:
                recorder.events.append(("token", -1 if token_id is None else token_id))
                super().begin_token(token_id)

            def _observed(self) -> None:
                recorder.events.append(("observe", self.num_steps - 1))

        assert self.shape_ is not None
        self.state = Recorded(self.shape_)
        return self.state

    def predict_next(self, state: LiveState, horizon: int = 1) -> Tensor:
        until = time.perf_counter() + self.busy_s
        while time.perf_counter() < until:
            pass
        self.events.append((f"predict {horizon}", state.num_steps))
        return super().predict_next(state, horizon)


@pytest.fixture
def recorder(dataset: TraceDataset) -> Recorder:
    return Recorder().fit(dataset)


def first_sequence(dataset: TraceDataset, columns: tuple[str, ...], tokens: int | None = None) -> RoutingBatch:
    trace = next(dataset.sequences("test", columns))
    batch = RoutingBatch.from_sequences([trace], dataset.spec)
    if tokens is None:
        return batch
    whole = {name: getattr(batch, name) for name in vars(batch)}
    cut = {name: value[:tokens] for name, value in whole.items() if name.endswith(("TLK", "TLE", "THLE", "_T"))
           and value is not None}  # fmt: skip
    return RoutingBatch(**{**whole, **cut, "offsets": torch.tensor([0, tokens])})


def test_each_choice_is_predicted_before_it_is_observed(dataset: TraceDataset, recorder: Recorder) -> None:
    batch = first_sequence(dataset, ("tokens",), tokens=3)
    decode_timed(recorder, batch, horizon=2)
    expected = []
    for token in range(3):
        expected.append(("token", int(batch.token_ids_T[token])))
        for step in range(token * 4, token * 4 + 4):
            expected += [("predict 2", step), ("observe", step)]
    assert recorder.events == expected


def test_what_is_observed_is_the_sequence(dataset: TraceDataset, recorder: Recorder) -> None:
    batch = first_sequence(dataset, ("weights", "lookahead", "tokens"))
    decode_timed(recorder, batch)
    seen = recorder.state.as_batch(batch.num_tokens)
    assert torch.equal(seen.expert_ids_TLK, batch.expert_ids_TLK)
    assert torch.equal(seen.routing_weights_TLK, batch.routing_weights_TLK)
    assert torch.equal(seen.lookahead_logits_THLE, batch.lookahead_logits_THLE)
    assert torch.equal(seen.token_ids_T, batch.token_ids_T)


@pytest.mark.parametrize(("tokens", "timed"), [(1, 1), (2, 1), (5, 4), (10, 9), (20, 18)])
def test_the_first_tenth_warms_up_and_is_not_timed(
    tokens: int, timed: int, dataset: TraceDataset, recorder: Recorder
) -> None:
    whole = first_sequence(dataset, ())
    assert whole.num_tokens >= 20
    predict, observe = decode_timed(recorder, first_sequence(dataset, (), tokens))
    assert len(predict) == len(observe) == timed * 4
    assert min(predict) > 0 < min(observe)


def test_times_are_microseconds_of_the_prediction_alone(dataset: TraceDataset, recorder: Recorder) -> None:
    recorder.busy_s = 2e-3
    predict, observe = decode_timed(recorder, first_sequence(dataset, (), tokens=3))
    assert 2000 <= min(predict) < 200_000
    assert sorted(observe)[len(observe) // 2] < 1000


def test_context_is_the_sequence_over_and_over_observed_and_not_predicted(
    dataset: TraceDataset, recorder: Recorder
) -> None:
    batch = first_sequence(dataset, (), tokens=3)
    predict, _ = decode_timed(recorder, batch, context=4)
    assert len(recorder.state.expert_ids) == 7 * 4
    assert [kind for kind, _ in recorder.events].count("predict 1") == 3 * 4
    assert next(step for kind, step in recorder.events if kind == "predict 1") == 4 * 4
    for token, seen in enumerate((2, 0, 1, 2, 0, 1, 2)):
        assert torch.equal(
            torch.stack(recorder.state.expert_ids[token * 4 : token * 4 + 4]), batch.expert_ids_TLK[seen]
        )
    assert len(predict) == 2 * 4


def test_decoding_stops_after_the_token_that_ends_the_time(dataset: TraceDataset, recorder: Recorder) -> None:
    recorder.busy_s = 2e-3
    batch = first_sequence(dataset, (), tokens=20)
    predict, _ = decode_timed(recorder, batch, most_s=0.0)
    assert len(predict) == 4  # the first token after the warm-up, whole
    recorder.events.clear()
    some, _ = decode_timed(recorder, batch, most_s=0.05)
    assert 4 <= len(some) < 18 * 4
    assert len(some) % 4 == 0


@pytest.mark.parametrize("name", ["statistics", "gate_lookahead"])
def test_predictors_with_states_of_their_own_are_timed_too(name: str, dataset: TraceDataset) -> None:
    predictor = create(name).fit(dataset)
    batch = first_sequence(dataset, ("weights", "lookahead"), tokens=4)
    predict, observe = decode_timed(predictor, batch, horizon=3)
    assert len(predict) == len(observe) == 3 * 4
