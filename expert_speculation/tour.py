"""The demo's commands, and the folder that they fill."""

import shutil
from pathlib import Path

from groundwork.errors import ConfigurationError

RUN = "traces"
PREDICTORS = ("gate_lookahead", "statistics", "interlayer", "foresight")
TRAINING = {"interlayer": ("--tokens", "--max_minutes", "1"), "foresight": ("--max_minutes", "0.5")}
REPORT = "report.html"
EVALUATION = "evaluation.json"


def prepare(output_dir: Path) -> None:
    """Make the folder, replacing an earlier demo's results.

    Raises:
        ConfigurationError: it holds anything that no demo wrote.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigurationError(f"--output_dir {output_dir}: is a file; name a folder")
    ours = {RUN, REPORT, EVALUATION, *PREDICTORS}
    present = sorted(path.name for path in output_dir.iterdir()) if output_dir.exists() else []
    foreign = [name for name in present if name not in ours]
    if foreign:
        raise ConfigurationError(
            f"--output_dir {output_dir}: holds {foreign[0]}, which no demo wrote; name an empty or a new folder"
        )
    for name in present:
        path = output_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)


def steps(output_dir: Path) -> list[list[str]]:
    """The demo's commands, each as the words after `expert-speculation`."""
    run = str(output_dir / RUN)
    folders = [str(output_dir / name) for name in PREDICTORS]
    named = [word for folder in folders for word in ("--predictor_dir", folder)]
    evaluation = str(output_dir / EVALUATION)
    return [
        ["collect", "--datasets", "installed", "--target_traces", "800", "--max_length", "256", "--dtype", "float32",
         "--store", "weights,lookahead", "--lookahead", "1", "--output_dir", run],
        *(["train", "--shard_dir", run, "--predictor", name, "--output_dir", folder, *TRAINING.get(name, ())]
          for name, folder in zip(PREDICTORS, folders, strict=True)),
        ["evaluate", "--shard_dir", run, *named, "--json", evaluation],
        ["report", "--shard_dir", run, *named, "--evaluation", evaluation, "--output", str(output_dir / REPORT)],
    ]  # fmt: skip
