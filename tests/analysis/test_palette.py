"""Expert colours: as many as experts, all different, none lost on its background or to colour-blind readers."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.palette import PATHS, expert_colours

# What is seen of linear RGB without one kind of cone: Machado, Oliveira and Fernandes, "A Physiologically-based Model
# for Simulation of Color Vision Deficiency", 2009, at severity 1.
SEEN = {
    "all cones": np.eye(3),
    "no L cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no M cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no S cones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Linear RGB to cone responses, and their cube roots to OKLab: Ottosson, "A perceptual color space", 2020.
TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
TO_OKLAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip
JUST_NOTICEABLE = 0.02  # distance in OKLab


def linear(colour: str) -> NDArray[np.float64]:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def closest(colours: list[str], seen: str) -> float:
    """The smallest distance of two of the colours in OKLab, as seen with these cones."""
    places = [TO_OKLAB @ np.cbrt(TO_CONES @ np.clip(SEEN[seen] @ linear(colour), 0, 1)) for colour in colours]
    return float(min(np.linalg.norm(a - b) for a, b in combinations(places, 2)))


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_eight_experts_and_six_paths_stay_apart_for_the_colour_blind(mode: str, seen: str) -> None:
    assert closest(expert_colours(8, mode), seen) > 3.5 * JUST_NOTICEABLE
    assert closest(list(PATHS[mode]), seen) > 7 * JUST_NOTICEABLE


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("experts", [1, 8, 9, 64, 256])
def test_colours_are_distinct_and_stand_out_from_the_page(experts: int, mode: str) -> None:
    colours = expert_colours(experts, mode)
    assert len(set(colours)) >= 0.99 * experts  # beyond 200 or so, two may round to the same
    page = 0.97 if mode == "light" else 0.008
    for colour in colours:
        bright, dark = sorted((luminance(colour), page), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 1.5
    if experts > 8:  # neighbours in number differ in lightness, not in hue alone
        assert all(abs(luminance(a) - luminance(b)) > 0.04 for a, b in pairwise(colours))
