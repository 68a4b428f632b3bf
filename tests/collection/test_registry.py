"""The registry is what its documentation says."""

import re
from pathlib import Path

from collection.registry import HUB, MIXES, known_names

PAGE = Path(__file__).resolve().parents[2] / "docs/DATASETS.md"


def test_every_registered_set_is_documented_as_it_is_registered() -> None:
    documented = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and (name := re.fullmatch(r"`(.+)`", cells[1])):
            repository = re.fullmatch(r"\[(.+)\]\(https://huggingface\.co/datasets/(.+)\)", cells[2])
            assert repository is not None
            assert repository[1] == repository[2]
            documented[name[1]] = (cells[0], repository[1], *cells[3:])
    assert documented == {
        name: (mix, set_.repository, set_.config or "", set_.split, ", ".join(set_.text_fields), set_.licence)
        for mix, members in MIXES.items()
        for name in members
        if (set_ := HUB.get(name)) is not None
    }


def test_every_name_is_in_the_message_for_unknown_ones_and_on_the_page() -> None:
    page = PAGE.read_text()
    for name in [*MIXES, *(member for members in MIXES.values() for member in members)]:
        assert name in known_names()
        assert f"`{name}`" in page
