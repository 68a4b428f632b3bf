"""Colours of the report: one per expert for any E, told apart by lightness as well as hue, and six for paths.

Up to eight experts take six colours of Okabe and Ito ("Color Universal Design", 2008) and two more, in place of their
black and yellow, each of which is lost on one of the two pages. All eight stay apart for people without one kind of
cone. Larger E walk round the OKLCH hue circle in golden-angle steps and cycle through four lightness levels, so that
neighbours in number differ in both and remain distinct without colour vision.
"""

import math

OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
EIGHT = {"light": (*OKABE_ITO, "#4a1a00", "#2b2370"), "dark": (*OKABE_ITO, "#fff3b0", "#8f2705")}
PATHS = {  # as far apart as six can be on which text is readable, white on the light page and black on the dark one
    "light": ("#536dd4", "#ad6109", "#161b7d", "#740c04", "#654f70", "#2a0029"),
    "dark": ("#5fb8f2", "#bdb21f", "#14fdfd", "#9b7c13", "#fff467", "#4c82c6"),
}
GOLDEN_ANGLE = 137.50776  # degrees: 360 * (1 - 1 / golden ratio)
LIGHTNESS = {"light": (0.50, 0.72, 0.60, 0.40), "dark": (0.62, 0.84, 0.73, 0.53)}


def expert_colours(num_experts: int, mode: str = "light") -> list[str]:
    """Return E hexadecimal colours for a `light` or `dark` background."""
    named = EIGHT[mode]
    if num_experts <= len(named):
        return list(named[:num_experts])
    levels = LIGHTNESS[mode]
    return [
        oklch_to_hex(levels[expert % len(levels)], 0.125, (expert * GOLDEN_ANGLE + 250.0) % 360.0)
        for expert in range(num_experts)
    ]


def oklch_to_hex(lightness: float, chroma: float, hue: float) -> str:
    """Convert OKLCH (hue in degrees) to `#rrggbb`, lowering chroma until it fits sRGB (Ottosson 2020, "A perceptual
    color space for image processing")."""
    while True:
        rgb = _oklch_to_linear(lightness, chroma, hue)
        if chroma < 0.01 or all(-1e-4 <= channel <= 1.0001 for channel in rgb):
            return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, channel)))):02x}" for channel in rgb)
        chroma *= 0.95


def _oklch_to_linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
