import pytest
import torch

from speculation.features import multi_hot, previous_token
from speculation.overlap_votes import DECAYS, KERNELS, NULL, overlap_votes


def votes(
    ids_TLK: torch.Tensor, residual_LTE: torch.Tensor, offsets: list[int], horizon: int, window: int
) -> torch.Tensor:
    hot_TLE = multi_hot(ids_TLK, residual_LTE.shape[2])
    before_TLE = previous_token(hot_TLE, torch.tensor(offsets))
    hot_LTE, before_LTE = hot_TLE.transpose(0, 1), before_TLE.transpose(0, 1)
    return overlap_votes(hot_LTE, before_LTE, residual_LTE, offsets, horizon, ids_TLK.shape[2], window)


@pytest.mark.parametrize(("horizon", "window"), [(1, 1024), (3, 4)])
def test_a_vote_weighs_what_the_two_tokens_share_at_the_steps_before(horizon: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(300, 3, 6, generator=generator).argsort(dim=2)[:, :, :2]
    residual = torch.rand(3, 300, 6, generator=generator)
    offsets = [0, 280, 300]
    found = votes(ids, residual, offsets, horizon, window)
    sets = [[set(layer) for layer in token] for token in ids.tolist()]
    for token, layer in [(0, 0), (1, 2), (270, 0), (279, 1), (280, 2), (299, 2)]:
        start = max(start for start in offsets if start <= token)
        # A step is (tokens before, layer); those before the sequence share nothing.
        path = [(1, below) for below in range(3)] + [(0, below) for below in range(3)]
        path = path[: 3 + layer - horizon + 1]
        for index, kernel in enumerate(KERNELS):
            total, mean = torch.tensor((NULL - 1) * kernel.sharpness).exp(), torch.zeros(6)
            for other in range(max(start, token - window), token):
                shared = most = 0.0
                for back, below in path:
                    known = other - back >= start
                    both = sets[token - back][below] & sets[other - back][below] if known else set()
                    shared = shared * DECAYS[kernel.decay] + len(both)
                    most = most * DECAYS[kernel.decay] + 2
                exponent = kernel.sharpness * (shared / most - 1) - kernel.fading * (token - other)
                weight = torch.tensor(exponent).exp()
                total, mean = total + weight, mean + weight * residual[layer, other]
            torch.testing.assert_close(found[layer, index, token], mean / total, atol=1e-5, rtol=1e-4)


def test_a_token_that_went_the_same_way_outvotes_all_others() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(40, 6, 32, generator=generator).argsort(dim=2)[:, :, :4]
    ids[30:32] = ids[10:12]
    residual = torch.rand(6, 40, 32, generator=generator)
    found = votes(ids, residual, [0, 40], 1, 1024)
    torch.testing.assert_close(found[5, 0, 31], residual[5, 11], atol=0.02, rtol=0)
    assert found[5, 0, 25].max() < 0.02
