"""The model card of a predictor folder: what it predicts, from what it was made, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from speculation.predictor import Predictor

CARD_FILE = "README.md"


def model_card(predictor: Predictor, folder_name: str) -> str:
    """The card as Markdown with Hugging Face metadata; every fact comes from the predictor's provenance."""
    assert predictor.shape_ is not None
    made = predictor.provenance_
    rows = {
        "Predictor": f"`{predictor.name}`",
        "Traced model": _code(made["traced_model"]),
        "Shape": str(predictor.shape_),
        "Traced in quantisation": _code(made["traced_quantization"]),
        "Trained on": f"{made['train_tokens']:,} tokens of {made['train_sequences']:,} sequences",
        "Data sets": ", ".join(_code(name) for name in made["datasets"]),
        "Learned from": _limits(made),
        "Held out": ", ".join(_code(name) for name in made["hold_out_dataset"]) or "none",
        "Sees": ", ".join(made["columns"]),
        "Plan fingerprint of the traces": f"`{made['plan_fingerprint']}`",
        "Duration": f"{made['seconds']:,.0f} s",
    }
    if "parameters" in made:
        rows |= {
            "Parameters": f"{made['parameters']:,}",
            "Steps": f"{made['steps']:,} ({made['trained_tokens']:,} tokens)",
            "Device": f"{made['processes']} x {made['device']}, products in {made['precision']}",
            "Memory": _memory(made),
            "Recall at K on validation_stop, 1 layer ahead": str(made["validation_recall"]),
        }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: expert-speculation
tags: [mixture-of-experts, expert-prediction]
---

# {folder_name}

Predicts which experts a mixture-of-experts model will choose, layers ahead of its routers, from the routing so far.
It fits traces of the model named here and of no other.

| | |
|---|---|
{table}

A validation figure chose the weights, so it flatters; `expert-speculation evaluate` scores sequences never used in
training, beside the baselines whose counts lie in `baselines.safetensors`:

```
expert-speculation evaluate --shard_dir RUN --predictor_dir {folder_name}
```

```python
from speculation import load_predictor

predictor = load_predictor("{folder_name}")
scores_TLE = predictor.predict_scores(batch, horizon=1)  # batch: speculation.RoutingBatch
```

Made with: {", ".join(f"{name} {version}" for name, version in made["library_versions"].items())}.

Settings: `{json.dumps(made.get("settings", {}))}`, options `{json.dumps(predictor.options())}`.
"""


def _limits(made: Mapping[str, Any]) -> str:
    """Which part of the train split was used."""
    limits = [f"data set {_code(name)} only" for name in made["only_dataset"]]
    if made["train_tokens_limit"] is not None:
        limits.append(f"the first {made['train_tokens_limit']:,} tokens of a seeded order only")
    return ", ".join(limits) or "the whole train split"


def _memory(made: Mapping[str, Any]) -> str:
    """The peaks of training beside the budget."""
    peaks = [f"{made['peak_host_memory_gb']:.2f} GB on the host"]
    if "peak_device_memory_gb" in made:
        peaks.append(f"{made['peak_device_memory_gb']:.2f} GB on the device")
    return f"{', '.join(peaks)}; at most {made['memory_budget_gb']:g} GB each were allowed"


def _code(text: str) -> str:
    """Foreign text as inline code that can not leave its table cell."""
    return f"`{str(text).replace('`', chr(39)).replace('|', '/').replace(chr(10), ' ')}`"
