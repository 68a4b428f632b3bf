"""Which versions of which libraries made a result."""

import platform
from importlib import metadata

RECORDED = ("expert-speculation", "torch", "transformers", "bitsandbytes", "datasets", "pyarrow", "numpy")


def library_versions() -> dict[str, str]:
    """Return name -> version of Python, this project and the libraries that can change its output, without importing
    them.

    A library that is not installed is left out.
    """
    versions = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
