"""Expert colours: as many as experts, all different, none lost on its background."""

from itertools import pairwise

import pytest

from analysis.palette import expert_colours


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
