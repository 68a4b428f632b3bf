"""The face of expert-speculation: the command line, and the public Python API by name.

Names are loaded on first use, so that `import expert_speculation` and `--help` stay fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "TraceDataset": "traces.reader",
    "TraceSpec": "traces.schema",
    "SequenceTrace": "traces.schema",
    "verify": "traces.verify",
    "ImportSettings": "traces.interchange.settings",
    "import_traces": "traces.interchange.importing",
    "export_traces": "traces.interchange.exporting",
    "load_model": "moe.load",
    "find_routers": "moe.routers",
    "ResidentTracer": "moe.resident",
    "CollectSettings": "collection.collector",
    "collect": "collection.collector",
    "Predictor": "speculation.predictor",
    "RoutingBatch": "speculation.features",
    "load_predictor": "speculation.predictor",
    "TrainSettings": "speculation.training.trainer",
    "train": "speculation.training.trainer",
    "evaluate": "speculation.evaluation",
    "SimulateSettings": "prefetch.settings",
    "simulate": "prefetch.simulate",
    "hardware_profile": "groundwork.profiles.loading",
    "model_profile": "groundwork.profiles.loading",
    "write_report": "analysis.report",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
