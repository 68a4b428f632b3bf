"""Every query of docs/QUERIES.md runs as it stands there and answers with rows."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(tmp_path, monkeypatch, make_spec, make_sequences, write_run):
    """A run of the demo's shape where the queries look for it: 8 layers, top 2 of 8, few different tokens."""
    spec = make_spec(num_layers=8)
    sequences = [replace(each, tokens_T=["the", " router"] * 50) for each in make_sequences(spec, [100] * 6)]
    write_run(tmp_path / "demo" / "traces", spec, sequences)
    monkeypatch.chdir(tmp_path)


def answer(code: str, names: dict[str, Any]) -> pl.DataFrame:
    """Run a block and return the value of its last line, as a notebook would show it."""
    tree = ast.parse(code)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    exec(compile(tree, "docs/QUERIES.md", "exec"), names)
    return eval(compile(ast.Expression(last.value), "docs/QUERIES.md", "eval"), names)


@pytest.mark.usefixtures("demo")
def test_each_of_the_five_queries_answers():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "QUERIES.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    tables = [answer(block, names) for block in blocks]
    assert [table.height for table in tables] == [3, 8, 2, 1, 3]
    assert tables[1]["selections"].sum() == 600 * 2
    assert all(0 <= share <= 1 for share in tables[3].row(0))
