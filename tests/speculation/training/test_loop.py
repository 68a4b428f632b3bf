from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.checkpoint import load_checkpoint
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from speculation.features import RoutingBatch
from speculation.interlayer.predictor import InterLayer
from speculation.training.loop import LoopSettings, fit_module
from speculation.training.state import Progress
from speculation.training.view import TrainingView
from traces.reader import TraceDataset

SMALL = {"hidden_size": 16, "mlp_size": 16, "context_size": 16, "context_heads": 2, "copy_heads": 2, "copy_key_size": 8}
NOISELESS = {**SMALL, "dropout": 0.0, "weight_dropout": 0.0}
EXACT = {"precision": "float32"}


class Watched(InterLayer):
    """InterLayer that can run out of memory, lose power, and count what it is given."""

    name = "watched"

    def __init__(self, fits: int = 10**9, **options: Any) -> None:
        super().__init__(**options)
        self.fits, self.sizes = fits, list[int]()
        self.before_loss: Callable[[int], None] = lambda calls: None

    def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
        self.sizes.append(batch.num_tokens)
        self.before_loss(len(self.sizes))
        if batch.num_tokens > self.fits:
            raise torch.OutOfMemoryError(f"tried {batch.num_tokens} tokens")
        return super().loss(logits_TLE, batch)


@pytest.fixture(scope="module")
def view(dataset: TraceDataset) -> TrainingView:
    return TrainingView(dataset)


def learned(predictor: InterLayer, view: TrainingView, **settings: Any) -> tuple[Progress, dict[str, Tensor]]:
    progress = fit_module(predictor, view, LoopSettings(**{**EXACT, **settings}))
    return progress, predictor.state()


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_running_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    view: TrainingView, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 4, "batch_tokens": 120}
    whole, tight = Watched(**NOISELESS), Watched(fits=70, **NOISELESS)
    plain, expected = learned(whole, view, **settings)
    progress, weights = learned(tight, view, **settings)
    assert max(whole.sizes) > 100
    assert 40 < progress.micro_batch_tokens <= 70 < plain.micro_batch_tokens  # so that no sequence had to be cut
    assert (progress.step, progress.tokens) == (plain.step, plain.tokens)
    assert differences(weights, expected) < 0.005
    log = capfd.readouterr().err
    assert "step 0: out of memory with" in log
    assert "doing it again with at most" in log


def test_a_predictor_that_fits_no_token_ends_training_with_a_reason(view: TrainingView) -> None:
    with pytest.raises(ExpertSpeculationError, match="out of memory with a single token"):
        learned(Watched(fits=0, **SMALL), view, max_steps=1)


def test_other_errors_in_a_step_are_not_taken_for_missing_memory(view: TrainingView) -> None:
    def fail(calls: int) -> None:
        raise RuntimeError("shape mismatch")

    predictor = Watched(**SMALL)
    predictor.before_loss = fail
    with pytest.raises(RuntimeError, match="shape mismatch"):
        learned(predictor, view, max_steps=1)


def test_an_interrupted_training_goes_on_to_the_same_weights_momenta_and_average(
    view: TrainingView, tmp_path: Path
) -> None:
    settings = LoopSettings(max_steps=12, batch_tokens=200, checkpoint_seconds=1e-9, ema=0.9)
    lines: dict[str, list[dict[str, Any]]] = {"whole": [], "broken": []}

    def fit(name: str, predictor: InterLayer) -> Progress:
        file = tmp_path / f"{name}.safetensors"
        return fit_module(predictor, view, settings, checkpoint=file, record=lines[name].append)

    def lose_power(calls: int) -> None:
        if calls == 11:
            raise ConnectionError("power cut")

    whole, broken, resumed = (Watched(**SMALL) for _ in range(3))
    expected = fit("whole", whole)
    broken.before_loss = lose_power
    with pytest.raises(ConnectionError):
        fit("broken", broken)
    halfway, facts = load_checkpoint(tmp_path / "broken.safetensors")
    assert facts["progress"]["step"] == 10
    assert facts["progress"]["piece"] > 0  # in the middle of an epoch
    assert {"optimizer.below_LXD/momentum", "optimizer.bias_LE/exp_avg", "average.bias_LE"} <= halfway.keys()
    progress = fit("broken", resumed)
    assert {**vars(progress), "seconds": 0} == {**vars(expected), "seconds": 0}
    one, other = (load_checkpoint(tmp_path / f"{name}.safetensors")[0] for name in lines)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in whole.state().items())
    recalls = [[line["validation_recall"] for line in lines[name] if "validation_recall" in line] for name in lines]
    assert recalls[0] == recalls[1]


def test_a_checkpoint_of_other_settings_is_refused_by_their_names(view: TrainingView, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    fit_module(Watched(**SMALL), view, LoopSettings(max_steps=2), checkpoint=file)
    with pytest.raises(ConfigurationError, match=r"other settings .option reach was \d, now 2.; repeat those"):
        fit_module(Watched(**SMALL, reach=2), view, LoopSettings(max_steps=2), checkpoint=file)
    with pytest.raises(ConfigurationError, match=r"learning_rate was 0\.003, now 0\.1"):
        fit_module(Watched(**SMALL), view, LoopSettings(max_steps=2, learning_rate=0.1), checkpoint=file)
    longer = fit_module(Watched(**SMALL), view, LoopSettings(max_steps=3), checkpoint=file)
    assert longer.step == 3


def test_accumulation_and_batch_size_make_equal_steps_of_equal_sequences(view: TrainingView) -> None:
    (one, first), (two, second) = (
        learned(Watched(**NOISELESS), view, max_steps=3, batch_size=size, gradient_accumulation_steps=times)
        for size, times in ((4, 1), (2, 2))
    )
    assert one.tokens == two.tokens
    assert differences(first, second) < 0.01


def test_training_ends_at_the_first_limit_and_falls_back_to_the_best_weights(view: TrainingView) -> None:
    assert learned(InterLayer(**SMALL), view, max_minutes=1e-6)[0].step == 1
    progress, _ = learned(InterLayer(**SMALL), view, epochs=50, learning_rate=1e-12, patience=2)
    assert progress.stale == 2
    assert progress.best_step < progress.step < 30
    progress, _ = learned(InterLayer(**SMALL), view, epochs=2)
    assert (progress.epoch, progress.piece) == (2, 0)


def test_the_average_is_kept_where_it_was_asked_for(view: TrainingView) -> None:
    _, plain = learned(InterLayer(**SMALL), view, max_steps=6)
    _, averaged = learned(InterLayer(**SMALL), view, max_steps=6, ema=0.5)
    assert differences(plain, averaged) > 1e-4


def test_a_loss_that_is_no_number_ends_training(view: TrainingView) -> None:
    class Diverging(InterLayer):
        def loss(self, logits_TLE: Tensor, batch: RoutingBatch) -> Tensor:
            return super().loss(logits_TLE, batch) * float("nan")

    with pytest.raises(ExpertSpeculationError, match="the training loss is nan at step 0; lower the learning rate"):
        learned(Diverging(**SMALL), view, max_steps=1)


def test_a_micro_batch_in_bfloat16_learns_what_float32_does(view: TrainingView) -> None:
    first, second = (learned(InterLayer(**NOISELESS), view, max_steps=6, precision=p) for p in ("float32", "bfloat16"))
    assert first[0].best_recall == pytest.approx(second[0].best_recall, abs=0.03)
    assert differences(first[1], second[1]) > 0
    assert all(tensor.dtype != torch.bfloat16 for tensor in second[1].values())


def test_impossible_settings_are_refused() -> None:
    for wrong, message in (
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"memory_budget_gb": 0.0}, "--memory_budget_gb 0.0: must be above 0"),
        ({"ema": 1.0}, "--ema 1.0: must be between 0 and 1"),
        ({"batch_size": 2, "batch_tokens": 9}, "--batch_size and --batch_tokens both say how large a step is"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            LoopSettings(**wrong)  # type: ignore[arg-type]
