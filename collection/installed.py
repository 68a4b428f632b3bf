"""Eight kinds of text that every Python installation with our dependencies holds, found in a fixed order.

They let the demo run without a hub: source code, prose, mark-up, numbers and legal text route differently, which is
what a mixed data set is for. Nothing is copied into the project; the texts are read where they were installed.
"""

import ast
import gzip
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from groundwork.errors import ConfigurationError

PASSAGE_CHARACTERS = 2_000
"""Files are cut at line ends into passages of about this many characters (some 600 tokens of the mini-Mixtral)."""

PASSAGES_PER_FILE = 24
"""No single file may dominate a kind of text."""

MAX_FILE_BYTES = 4_000_000
"""Longer files are generated data; only their beginning is read."""

Passage = tuple[str, str]


def read_installed(kind: str) -> Iterator[Passage]:
    """Yield `(key, text)` passages of one kind, in an order fixed by the installed versions.

    Args:
        kind: one of `KINDS`.

    Raises:
        ConfigurationError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"installed text '{kind}' is unknown; known kinds: {', '.join(KINDS)}")
    return KINDS[kind]()


def _python_code() -> Iterator[Passage]:
    """Modules of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    folders = [stdlib, *(stdlib / name for name in ("asyncio", "email", "http", "json", "logging", "unittest", "xml"))]
    yield from _files(stdlib, (path for folder in folders for path in sorted(folder.glob("*.py"))))


def _docstrings() -> Iterator[Passage]:
    """Documentation strings of the scientific libraries, those of a module together."""
    for package, inside in (("numpy", "lib"), ("scipy", "stats"), ("sklearn", "linear_model"), ("torch", "nn/modules")):
        root = _package_folder(package)
        for path in sorted((root / inside).rglob("*.py")):
            if "tests" in path.parts:
                continue
            found = _documented(_read_text(path))
            if found:
                yield from _passages(f"{package}/{path.relative_to(root).as_posix()}", "\n\n".join(found))


def _documented(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
    return [text for text in found if text and len(text) > 200]


def _language_manual() -> Iterator[Passage]:
    """Chapters of the Python language reference, as `help()` shows them."""
    for name in sorted(topics):
        yield from _passages(f"topics/{name}", topics[name])


def _package_readmes() -> Iterator[Passage]:
    """The long descriptions that packages publish."""
    for distribution in _distributions():
        description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        yield from _passages(f"{distribution.name}/README", str(description))


def _licences() -> Iterator[Passage]:
    """Licence files of the installed packages."""
    for distribution in _distributions():
        for file in sorted(distribution.files or [], key=str):
            if any(word in file.name.upper() for word in ("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file() and path.suffix not in {".py", ".pyc"}:
                    yield from _passages(f"{distribution.name}/{file.name}", _read_text(path))


def _cpp_headers() -> Iterator[Passage]:
    """C++ headers that torch and pyarrow install."""
    for package, inside in (("torch", "include/c10"), ("torch", "include/ATen/core"), ("pyarrow", "include/arrow")):
        root = _package_folder(package)
        yield from _files(root, sorted((root / inside).rglob("*.h")))


def _tables() -> Iterator[Passage]:
    """Tables of numbers that numpy, scikit-learn and scipy install, as comma- or space-separated text."""
    for package in ("numpy", "scipy", "sklearn"):
        root = _package_folder(package)
        found = sorted(path for path in root.rglob("*") if path.name.endswith((".csv", ".csv.gz", ".dat")))
        yield from _files(root, found)


def _json() -> Iterator[Passage]:
    """JSON documents of installed packages: schemas, templates, software bills of materials."""
    site = Path(sysconfig.get_path("purelib"))
    yield from _files(site, sorted(path for path in site.rglob("*.json") if not path.name.startswith("direct_url")))


KINDS: dict[str, Callable[[], Iterator[Passage]]] = {
    "python_code": _python_code,
    "docstrings": _docstrings,
    "language_manual": _language_manual,
    "package_readmes": _package_readmes,
    "cpp_headers": _cpp_headers,
    "tables": _tables,
    "json": _json,
    "licences": _licences,
}


def _distributions() -> list[importlib.metadata.Distribution]:
    found = {distribution.name: distribution for distribution in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found)]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"package '{name}' is not installed; run 'pip install {name}' and try again")
    return Path(spec.origin).parent


def _files(root: Path, paths: Iterable[Path]) -> Iterator[Passage]:
    for path in paths:
        yield from _passages(f"{root.name}/{path.relative_to(root).as_posix()}", _read_text(path))


def _read_text(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")


def _passages(key: str, text: str) -> Iterator[Passage]:
    """Cut a text at line ends (within a line where it is longer than a passage), evenly spread over a long one."""
    lines = [
        line[start : start + PASSAGE_CHARACTERS]
        for line in text.splitlines(keepends=True)
        for start in range(0, len(line), PASSAGE_CHARACTERS)
    ]
    passages: list[str] = []
    length = PASSAGE_CHARACTERS + 1
    for line in lines:
        if length + len(line) > PASSAGE_CHARACTERS:
            passages.append("")
            length = 0
        passages[-1] += line
        length += len(line)
    stride = max(1, -(-len(passages) // PASSAGES_PER_FILE))
    for number in range(0, len(passages), stride):
        if passages[number].strip():
            yield f"{key}#{number}", passages[number].strip()
