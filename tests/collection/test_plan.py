"""The digest of a model's weights covers every bit of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from collection.plan import weights_digest


class Weights(torch.nn.Module):
    """Parameters and a buffer of several types; 300,001 values are more than the 1 MiB that is reduced at once."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.large = torch.nn.Parameter(torch.randn(300_001, generator=generator))
        self.small = torch.nn.Parameter(torch.randn(7, 3, generator=generator).to(torch.bfloat16))
        self.packed = torch.nn.Parameter(torch.arange(13, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))


WEIGHTS = Weights()
BEFORE = weights_digest(WEIGHTS)
NAMES = ["large", "small", "packed", "scale"]


def test_equal_weights_have_equal_digests_wherever_they_lie() -> None:
    again = Weights()
    again.large.data = torch.stack([again.large.data, again.large.data], 1)[:, 0]  # not contiguous
    assert weights_digest(again) == BEFORE


@given(st.sampled_from(NAMES), st.data())
def test_any_flipped_bit_changes_the_digest(name: str, data: st.DataObject) -> None:
    values = getattr(WEIGHTS, name).data.reshape(-1).view(torch.uint8)  # a view of the weights themselves
    byte, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 7))
    values[byte] ^= 1 << bit
    changed = weights_digest(WEIGHTS)
    values[byte] ^= 1 << bit
    assert changed != BEFORE
    assert weights_digest(WEIGHTS) == BEFORE


@given(st.lists(st.integers(0, 300_000), min_size=2, max_size=20, unique=True))
def test_flipped_signs_and_swapped_values_do_not_cancel_out(places: list[int]) -> None:
    values = WEIGHTS.large.data
    values[places] *= -1
    flipped = weights_digest(WEIGHTS)
    values[places] *= -1
    values[places[:2]] = values[places[1::-1]]
    swapped = weights_digest(WEIGHTS)
    values[places[:2]] = values[places[1::-1]]
    assert BEFORE not in (flipped, swapped)
    assert weights_digest(WEIGHTS) == BEFORE


def test_types_names_and_shapes_count() -> None:
    others = [Weights() for _ in range(3)]
    others[0].small.data = others[0].small.data.reshape(3, 7)
    others[1].packed.data = others[1].packed.data.view(torch.int8)
    others[2].renamed, others[2].small = others[2].small, None
    assert BEFORE not in [weights_digest(other) for other in others]
