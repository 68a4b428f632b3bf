"""The house's rules: which package may import which, and what no file may contain."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "groundwork": set(),
    "traces": {"groundwork"},
    "moe": {"groundwork"},
    "collection": {"groundwork", "traces", "moe"},
    "speculation": {"groundwork", "traces"},
    "prefetch": {"groundwork", "traces", "speculation"},
    "analysis": {"groundwork", "traces", "speculation", "prefetch"},
    "expert_speculation": {"groundwork", "traces", "moe", "collection", "speculation", "prefetch", "analysis"},
}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & MAY_IMPORT.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_from_lower_floors(package):
    for path in (ROOT / package).rglob("*.py"):
        upwards = _imported(path) - MAY_IMPORT[package] - {package}
        assert not upwards, f"{path.relative_to(ROOT)} imports {', '.join(upwards)}"


def test_every_package_is_listed_in_pyproject_with_its_types():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(listed) == present
    assert all((ROOT / package / "py.typed").exists() for package in MAY_IMPORT)


def test_nothing_is_pickled_and_no_remote_code_is_trusted():
    forbidden = re.compile(
        r"\bimport pickle\b|(?<!safetensors\.)torch\.(save|load)\(|trust_remote_code\s*=\s*True|joblib\.dump"
    )
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            assert not forbidden.search(path.read_text()), path.relative_to(ROOT)


def test_every_requirement_is_pinned_in_the_constraints():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split("\n")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    assert {re.match(r"[\w-]+", item)[0].lower().replace("_", "-") for item in wanted} <= pinned
