"""JSON with one line for each row says the same as json's own, in less room."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from groundwork.json_rows import dumps_rows

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda each: st.lists(each) | st.dictionaries(st.text() | st.integers(0, 9), each),
    max_leaves=30,
)


@given(VALUES)
def test_it_reads_back_as_what_json_itself_writes(value: Any) -> None:
    assert json.loads(dumps_rows(value)) == json.loads(json.dumps(value))


def test_a_row_of_numbers_takes_one_line_and_a_key_too() -> None:
    value = {"figures": {"usage": {"rows": [[0, 12.5], [1, 7.25]]}}, "journeys": [{"ids": [[[1, 2], [3, 4]]]}], 2: None}
    assert dumps_rows(value).splitlines() == [
        "{",
        '  "figures": {',
        '    "usage": {',
        '      "rows": [',
        "        [0,12.5],",
        "        [1,7.25]",
        "      ]",
        "    }",
        "  },",
        '  "journeys": [',
        "    {",
        '      "ids": [',
        "        [[1,2],[3,4]]",
        "      ]",
        "    }",
        "  ],",
        '  "2": null',
        "}",
    ]


def test_what_json_has_no_form_for_is_written_as_its_text() -> None:
    assert json.loads(dumps_rows({"file": Path("a/b"), "rows": [[Path("c")]]})) == {"file": "a/b", "rows": [["c"]]}
