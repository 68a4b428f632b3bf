"""Section of token classes: which experts serve digits, punctuation, words of several sorts, and places in the text."""

from typing import Any

import numpy as np

from analysis.counts.token_classes import CLASSES, MIN_SEQUENCES, ClassDifferences, TokenClassCounts
from analysis.figures import Figure, Notice, Section, category_axis, heatmap, rounded
from analysis.heatmaps import ALPHA, small_multiples
from analysis.tokens import readable

STRONGEST = 3  # experts listed per class
EXAMPLES = 5  # token texts shown with each


def make(counts: TokenClassCounts) -> Section:
    """Return the section; without token strings only places in the sequence are classes."""
    found = counts.differences()
    notices = []
    if not counts.texts_known:
        notices.append(Notice("These traces hold no token text, so that tokens are told apart by their place only."))
    missing = [name for name in CLASSES if name not in found.classes]
    if counts.texts_known and missing:
        notices.append(
            Notice(
                f"Not shown, since fewer than {MIN_SEQUENCES} sequences hold them beside others: {', '.join(missing)}."
            )
        )
    figures = (class_figure(found), strength_figure(found)) if found.classes else ()
    strongest = strongest_experts(counts, found)
    return Section(
        key="token_classes",
        title="Classes of tokens",
        lead=(
            "What an expert is for may lie in the token rather than in the text. Every class is compared with all "
            "tokens of the same sequences, so that differences between texts cancel out; the test takes sequences as "
            "its unit."
        ),
        figures=figures,
        notices=tuple(notices),
        partial="token_classes.html.j2",
        values={"strongest": strongest},
        numbers={
            "token_classes": {
                "strongest": strongest,
                "sequences": dict(zip(found.classes, found.sequences_C.tolist(), strict=True)),
            }
        },
    )


def class_figure(found: ClassDifferences) -> Figure:
    """Small multiples, one per class: its share of each expert less that of its texts, in percentage points."""
    points_CLE, q_CLE = 100 * found.difference_CLE, found.q_CLE
    spec, min_width = small_multiples(found.classes, points_CLE, q_CLE)
    place = tuple(
        int(i) for i in np.unravel_index(int(np.abs(np.where(q_CLE < ALPHA, points_CLE, 0)).argmax()), points_CLE.shape)
    )
    clear_CLE = q_CLE < ALPHA
    tested = f"(q < {ALPHA}, Benjamini-Hochberg over t-tests of sequences)"
    sentence = (
        "Orange marks experts that serve a class more than the other tokens of the same texts, blue less; faded cells "
        "may be chance. "
    )
    if clear_CLE.any():
        sentence += (
            f"{100 * clear_CLE.mean():.0f} % of all cells are beyond chance {tested}; most of all, expert {place[2]} "
            f"of layer {place[1]} takes {abs(points_CLE[place]):.1f} points "
            f"{'more' if points_CLE[place] > 0 else 'less'} of the selections of “{found.classes[place[0]]}”."
        )
    else:
        sentence += f"Here not one cell is beyond chance {tested}."
    num_experts = points_CLE.shape[2]
    return Figure(
        key="token_classes",
        title="Difference of token classes to the mean of their texts",
        sentence=sentence,
        spec=spec,
        columns=[
            "class",
            "tokens",
            "sequences",
            "layer",
            *(f"expert {expert}, pt" for expert in range(num_experts)),
            *(f"expert {expert}, q" for expert in range(num_experts)),
        ],
        rows=[
            [
                name,
                int(found.tokens_C[c]),
                int(found.sequences_C[c]),
                layer,
                *rounded(points_CLE[c, layer], 2),
                *rounded(q_CLE[c, layer], 4),
            ]
            for c, name in enumerate(found.classes)
            for layer in range(points_CLE.shape[1])
        ],
        min_width=min_width,
    )


def strength_figure(found: ClassDifferences) -> Figure:
    """Heatmap of classes by layers: the part of a class's selections that goes elsewhere than its texts' do."""
    moved_CL = 50 * np.where(found.q_CLE < ALPHA, np.abs(found.difference_CLE), 0.0).sum(axis=2)
    num_classes, num_layers = moved_CL.shape
    trace = heatmap(moved_CL, "sequential", zmin=0, zmax=float(moved_CL.max()) or 1.0) | {
        "hovertemplate": "%{y}, layer %{x}<br>%{z:.1f} % of selections moved<extra></extra>",
        "y": found.classes,
        "colorbar": {"ticksuffix": " %"},
    }
    if num_layers <= 16:
        trace["texttemplate"] = "%{z:.0f}"
    by_class = moved_CL.mean(axis=1)
    most, peak = int(by_class.argmax()), int(moved_CL.mean(axis=0).argmax())
    return Figure(
        key="token_class_strength",
        title="How much a class moves the routing, by layer",
        sentence=(
            f"The part of a class's selections that goes to other experts than the mean of its texts would send it to, "
            f"counting differences beyond chance alone: most for “{found.classes[most]}” with {by_class[most]:.1f} % "
            f"on average over layers, and over all classes most in layer {peak}."
        ),
        spec={
            "data": [trace],
            "layout": {
                "height": 26 * num_classes + 70,
                "margin": {"l": 130, "r": 10, "t": 8, "b": 46},
                "xaxis": category_axis(num_layers, 32) | {"title": {"text": "layer"}},
                "yaxis": {
                    "showgrid": False,
                    "zeroline": False,
                    "ticks": "",
                    "autorange": "reversed",
                    "type": "category",
                },
            },
        },
        columns=["class", *(f"layer {layer}, %" for layer in range(num_layers))],
        rows=[[name, *rounded(row, 2)] for name, row in zip(found.classes, moved_CL, strict=True)],
        max_width=int(np.clip(320 + 40 * num_layers, 520, 1080)),
    )


def strongest_experts(counts: TokenClassCounts, found: ClassDifferences) -> list[dict[str, Any]]:
    """Return, per class, the experts that serve it most beyond its texts' mean, with some tokens that chose them."""
    rows = []
    for c, name in enumerate(found.classes):
        points_LE = np.where(found.q_CLE[c] < ALPHA, 100 * found.difference_CLE[c], -np.inf)
        for place in np.argsort(-points_LE, axis=None, kind="stable")[:STRONGEST]:
            layer, expert = (int(i) for i in np.unravel_index(place, points_LE.shape))
            if points_LE[layer, expert] > 0:
                rows.append(
                    {
                        "class": name,
                        "layer": layer,
                        "expert": expert,
                        "share": round(100 * float(found.share_CLE[c, layer, expert]), 2),
                        "difference": round(float(points_LE[layer, expert]), 2),
                        "q": float(found.q_CLE[c, layer, expert]),
                        "examples": [readable(text) for text in counts.examples(name, layer, expert)[:EXAMPLES]],
                    }
                )
    return rows
