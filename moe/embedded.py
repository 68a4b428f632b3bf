"""Where the embedded model lies, without the seconds that importing `mini` takes: command lines ask for it."""

import sys
from pathlib import Path


def embedded_model() -> Path | None:
    """The embedded checkpoint of the repository, or of an installed wheel; None where neither is there."""
    homes = (Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "expert-speculation")
    found = (home / "models" / "mini-mixtral" for home in homes)
    return next((path for path in found if (path / "config.json").exists()), None)
