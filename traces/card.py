"""The data set card of a run folder: README.md with the front matter that the Hugging Face hub and `load_dataset` read.

Generated from plan and manifest alone, so it says what is there, not what was hoped for. Names come from foreign data
and are escaped. Its last line, a comment, seals it: with the run's plan and counts, and a digest of all that stands
before. So `verify` knows a changed card, and one that is out of date, whichever version of this program wrote it. Who
edits a card puts EDITED there as the last line instead: such a card is never written over, and not checked either.
"""

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from groundwork.atomic import write_bytes
from traces.faults import REPAIR, Fault, unread
from traces.manifest import ManifestLine, read_manifest
from traces.plain_files import read_plain
from traces.plan import Plan
from traces.schema import HIDDEN, ROUTER_INPUT, TraceSpec

CARD_NAME = "README.md"
CARD_LIMIT = 16 * 2**20  # bytes
EDITED = "<!-- edited by hand -->"
UNKNOWN = "unknown"
_SEALED = re.compile(rb"<!-- (.*); blake2b [0-9a-f]{32} -->")
_COLUMNS = {
    "expert_ids": "ids of the routed experts, layer-major [L*K]",
    "routing_weights": "what their outputs are multiplied by, float16, layer-major [L*K]",
    "router_logits": "all scores before selection, float16, layer-major [L*E]",
    "lookahead_logits": "layer l's router asked h layers early, float16, [H*L*E], indexed by target layer",
}

_HIDDEN = (
    "what the routers read, bytes of little-endian float16, layer-major [L*D] with D = {spec.hidden_size}; null but in "
    "{spec.hidden_fraction:g} of the tokens"
)


def write_card(run_dir: Path) -> None:
    """Write README.md of a run folder that has a plan, unless it says that it was edited by hand."""
    path = run_dir / CARD_NAME
    if not is_edited(path):
        write_bytes(path, sealed_card(Plan.load(run_dir), read_manifest(run_dir)))


def is_edited(path: Path) -> bool:
    """Say whether a card's last line is EDITED."""
    try:
        return read_plain(path, CARD_LIMIT).rstrip().endswith(EDITED.encode())
    except (OSError, ValueError):
        return False


def card_fault(run_dir: Path, plan: Plan | None, manifest: list[ManifestLine] | None) -> Fault | None:
    """Return what is wrong with the card, or None; counts are compared where `plan` and `manifest` are given."""
    path = run_dir / CARD_NAME
    remedy = f"{REPAIR}, which writes it anew; to keep it as it is, make '{EDITED}' its last line"
    try:
        text = read_plain(path, CARD_LIMIT)
    except FileNotFoundError:
        return Fault(path, "missing", f"{REPAIR}, which writes it")
    except OSError as error:
        return unread(path, error)
    except ValueError as error:
        return Fault(path, str(error), f"move it away and {REPAIR}, which writes it anew")
    if is_edited(path):
        return None
    facts = sealed_facts(text)
    if facts is None:
        return Fault(path, "was changed: it differs from its own digest", remedy)
    wanted = facts if plan is None or manifest is None else _facts(plan, manifest)
    if facts != wanted:
        return Fault(path, f"is out of date: its last line says {facts!r}, wanted {wanted!r}", remedy)
    return None


def sealed_facts(text: bytes) -> str | None:
    """Return what a card's seal says of the run, or None where the card is not as it was written."""
    body, newline, seal = text.removesuffix(b"\n").rpartition(b"\n")
    found = _SEALED.fullmatch(seal)
    facts = found[1].decode(errors="replace") if found else ""
    return facts if found and text == body + newline + _seal(body + newline, facts) else None


def sealed_card(plan: Plan, manifest: list[ManifestLine]) -> bytes:
    """Return the card as it stands in the file, with its seal."""
    text = render_card(plan, manifest).encode() + b"\n"
    return text + _seal(text, _facts(plan, manifest))


def render_card(plan: Plan, manifest: list[ManifestLine]) -> str:
    """Return the card as Markdown."""
    spec = plan.spec
    done = {line.index for line in manifest}
    rows = zip(*(plan.sequences[name].to_pylist() for name in ("dataset", "num_tokens", "shard")), strict=True)
    sequences: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for dataset, length, shard in rows:
        sequences[dataset] += shard in done
        tokens[dataset] += length if shard in done else 0
    counts = [(_plain(name), f"{sequences[name]:,}", f"{tokens[name]:,}") for name in sequences]
    missing = [shard.name for shard in plan.shards if shard.index not in done]
    notes = [f"- {line.shard}: {_plain(note)}" for line in manifest for note in line.notes]
    gaps = [f"- {len(missing)} of {len(plan.shards)} planned shards are not there yet."] * bool(missing) + notes
    known = {key for source in plan.sources for key, value in source.items() if value is not None}
    facts = tuple(sorted(known, key=lambda key: (key != "name", key)))
    sources = [tuple(_cell(source.get(key)) for key in facts) for source in plan.sources]
    columns = [
        ("dataset, sequence_id, sequence_key", "data set, number within the run, the source's own id"),
        ("position, phase", "token within its sequence; 0 prefill, 1 decode"),
        ("token_id, token", "-1 and empty where unknown"),
        *((name, f"{_COLUMNS[name]}: {width} a token") for name, width in spec.widths.items()),
        *([(ROUTER_INPUT, _HIDDEN.format(spec=spec))] if HIDDEN in spec.store else []),
    ]
    return "\n".join(
        [
            "---",
            f"pretty_name: {json.dumps('Routing traces of ' + spec.model_name)}",
            "tags:\n- mixture-of-experts\n- routing-traces\n- expert-speculation",
            "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet",
            "---",
            "",
            f"# Routing traces of {_plain(spec.model_name)}",
            "",
            f"Which experts the model's routers chose: {sum(sequences.values()):,} sequences, "
            f"{sum(tokens.values()):,} tokens, {len(done)} shards. "
            "One row is one token; a sequence's rows stand together and are never cut.",
            "",
            "## Model and run",
            "",
            *_table(("field", "value"), _describe(spec)),
            "",
            "## Data sets",
            "",
            *_table(("data set", "sequences", "tokens"), counts),
            "",
            "## Sources",
            "",
            *_table(tuple(map(_plain, facts)), sources),
            "",
            "## Columns",
            "",
            *_table(("column", "content"), columns),
            "",
            "## Known gaps",
            "",
            *(gaps or ["None known."]),
            "",
        ]
    )


def _facts(plan: Plan, manifest: list[ManifestLine]) -> str:
    """Return what a card is out of date without."""
    sequences, tokens = (sum(getattr(line, name) for line in manifest) for name in ("sequences", "tokens"))
    notes = sum(len(line.notes) for line in manifest)
    return f"plan {plan.fingerprint}: {len(manifest)} shards, {sequences} sequences, {tokens} tokens, {notes} notes"


def _seal(text: bytes, facts: str) -> bytes:
    digest = hashlib.blake2b(text + facts.encode(), digest_size=16).hexdigest()
    return f"<!-- {facts}; blake2b {digest} -->\n".encode()


def _describe(spec: TraceSpec) -> list[tuple[str, str]]:
    """Return the spec as rows; what is not known says so."""
    versions = ", ".join(f"{name} {version}" for name, version in spec.library_versions.items())
    values = {
        "model": spec.model_name,
        "revision": spec.model_revision,
        "MoE layers (L), experts (E), per token (K)": f"{spec.num_layers}, {spec.num_experts}, {spec.top_k}",
        "layers in the model": ", ".join(map(str, spec.moe_layers)),
        "order of a token's experts": "by falling weight" if spec.expert_order == "weight" else None,
        "weights sum to 1": spec.weights_normalized,
        "quantization, dtype, router dtype": f"{spec.quantization}, {spec.model_dtype}, {spec.router_dtype}",
        "attention implementation": spec.attn_implementation,
        "experts implementation": spec.experts_implementation,
        "library versions": versions,
        "seed": spec.seed,
        "plan": spec.plan_fingerprint,
    }
    return [(name, _plain(UNKNOWN if value is None else value)) for name, value in values.items()]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _cell(value: object) -> str:
    """Return a source's fact for a table; counts by reason as `36 duplicate, 2 too short`."""
    if isinstance(value, dict):
        return _plain(", ".join(f"{count} {reason}" for reason, count in sorted(value.items())) or "none")
    return "" if value is None else _plain(value)


def _plain(value: object) -> str:
    """Return foreign text as one line that is neither HTML nor Markdown structure."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join("\\" + letter if letter in "\\`*[]|#" else letter for letter in text)
