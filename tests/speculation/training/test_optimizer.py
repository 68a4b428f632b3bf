import math

import pytest
import torch
from torch import Tensor, nn

from groundwork.errors import ConfigurationError
from speculation.training.optimizer import MUON_DECAY, MUON_RATE, MuonAdamW, muon_step, orthogonal


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tables = nn.Parameter(torch.randn(3, 12, 8, generator=generator))
        self.matrix = nn.Parameter(torch.randn(8, 20, generator=generator))
        self.bias = nn.Parameter(torch.randn(20, generator=generator))


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_a_matrix_moves_as_with_torchs_muon(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(shape, generator=generator)
    theirs, momentum = nn.Parameter(ours.clone()), torch.zeros(shape)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=MUON_DECAY)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        theirs.grad = gradient
        reference.step()
        muon_step(ours, gradient, momentum, 0.02)
        torch.testing.assert_close(momentum, reference.state[theirs]["momentum_buffer"])
    # A step of 0.02 is computed in bfloat16, which keeps three digits of it.
    torch.testing.assert_close(ours, theirs.detach(), atol=4 * 0.02 * 2**-7, rtol=0)


@pytest.mark.parametrize("shape", [(5, 24, 16), (5, 16, 24)])
def test_a_batch_of_matrices_moves_as_each_matrix_alone(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    together = torch.randn(shape, generator=generator)
    alone = [each.clone() for each in together]
    gradient, momentum = torch.randn(shape, generator=generator), torch.zeros(shape)
    muon_step(together, gradient, momentum, 0.02)
    for each, its_gradient in zip(alone, gradient, strict=True):
        muon_step(each, its_gradient, torch.zeros(shape[1:]), 0.02)
    torch.testing.assert_close(together, torch.stack(alone), atol=0.02 * 2**-7, rtol=0)


def test_steps_are_nearly_orthogonal_whatever_the_scale_of_the_gradient() -> None:
    matrices = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(3))
    for scale in (1e-6, 1.0, 1e4):
        values: Tensor = torch.linalg.svdvals(orthogonal(scale * matrices).float())
        assert values.min() > 0.5
        assert values.max() < 1.4
    assert torch.equal(orthogonal(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4, dtype=torch.bfloat16))


def test_the_rest_moves_as_with_adamw_and_only_matrices_decay() -> None:
    module, other = Layered(), Layered()
    optimizer = MuonAdamW(module, ["tables"], learning_rate=0.01)
    reference = torch.optim.AdamW(
        [{"params": [other.matrix], "weight_decay": 0.05}, {"params": [other.bias], "weight_decay": 0.0}],
        lr=0.005,
        betas=(0.9, 0.98),
    )
    for step in range(3):
        gradients(module, step)
        gradients(other, step)
        torch.nn.utils.clip_grad_norm_([other.matrix, other.bias], 1.0)
        optimizer.step(rate=0.5)
        reference.step()
    torch.testing.assert_close(module.matrix, other.matrix)
    torch.testing.assert_close(module.bias, other.bias)
    moved = (module.tables - other.tables).detach().norm() / math.sqrt(3 * 8)
    assert 0.3 * 3 * MUON_RATE * 0.005 < float(moved) < 3 * 3 * MUON_RATE * 0.005


def test_an_optimizer_goes_on_exactly_from_its_state() -> None:
    whole, halved = Layered(), Layered()
    names = ["tables", "matrix"]
    first, second = MuonAdamW(whole, names, 0.01), MuonAdamW(halved, names, 0.01)
    for step in range(4):
        if step == 2:
            state = {name: tensor.clone() for name, tensor in second.state_dict().items()}
            second = MuonAdamW(halved, names, 0.01)
            second.load_state_dict(state)
        for module, optimizer in ((whole, first), (halved, second)):
            gradients(module, step)
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(whole.parameters(), halved.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {"tables/momentum", "bias/exp_avg"} <= first.state_dict().keys()


def test_what_muon_can_not_train_and_foreign_states_are_refused() -> None:
    with pytest.raises(ValueError, match="not bias, nowhere"):
        MuonAdamW(Layered(), ["tables", "bias", "nowhere"], 0.01)
    with pytest.raises(ConfigurationError, match="another predictor"):
        MuonAdamW(Layered(), ["tables"], 0.01).load_state_dict({"matrix/exp_avg": torch.zeros(8, 20)})
