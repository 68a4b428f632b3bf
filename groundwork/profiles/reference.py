"""The tables of docs/HARDWARE.md, written from the packaged profiles: what they hold, and what tracing would take.

python -m groundwork.profiles.reference docs/HARDWARE.md
"""

import sys
from pathlib import Path

from groundwork.profiles import execution_tables
from groundwork.profiles.loading import hardware_profile, known_hardware, known_models, model_profile

START, END = "<!-- start: groundwork.profiles.reference -->\n", "<!-- end -->\n"
EXECUTIONS_START = "<!-- start: groundwork.profiles.execution_tables -->\n"


def tables() -> str:
    """Return the tables of machines and models, and where their numbers come from, in Markdown."""
    machines = {name: hardware_profile(name) for name in known_hardware()}
    models = {name: model_profile(name) for name in known_models()}
    lines = [
        "| `--hardware` | GPU memory, GB (reserved) | reads, GB/s | 16-bit products, TFLOP/s | layer, us | "
        "link, GB/s (us) | disk, GB/s (us) | RAM, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {each.gpu_memory_gb:g} ({each.reserved_gb:g}) | {each.memory_gb_s:g} | "
        f"{each.compute_tflops:g} | {each.layer_overhead_us:g} | {each.link_gb_s:g} ({each.link_latency_us:g}) | "
        f"{each.disk_gb_s:g} ({each.disk_latency_us:g}) | {each.ram_gb:g} |"
        for name, each in machines.items()
    ]
    lines += [
        "",
        "| `--model_profile` | MoE layers | experts, a token's | parameters, billions | stays, GB | an expert, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        order = sorted(model.precisions, key=lambda each: each != model.default_precision)
        sizes = ", ".join(f"{each} {model.expert_bytes(each) / 1e6:.3g}" for each in order)
        lines.append(
            f"| `{name}` | {model.moe_layers} | {model.num_experts}, {model.top_k} | "
            f"{model.total_parameters / 1e9:.4g} | {model.resident_bytes() / 1e9:.3g} | {sizes} |"
        )
    sources = [(name, each.name, each.source) for name, each in machines.items()]
    sources += [(name, each.name, each.source) for name, each in models.items()]
    for name, title, source in sources:
        lines += ["", f"**{name}** ({title})", ""]
        lines += [f"- {line}" for line in source.strip().splitlines()]
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """Return the text of docs/HARDWARE.md with the tables as they are now."""
    for start, written in ((START, tables()), (EXECUTIONS_START, execution_tables.table())):
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(END)
        text = before + start + written + END + after
    return text


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text()))
