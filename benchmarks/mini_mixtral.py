"""Is the embedded mini-Mixtral a trained model with healthy routing? Prints the figures of its model card.

    .venv/bin/python benchmarks/mini_mixtral.py --model models/mini-mixtral --text FOLDER [--text FOLDER ...]

On the documents that `pretrain` held out, source by source: loss per token beside an interpolated trigram model's,
which was fitted with the same tokenizer on the same training text. Over the mix (equally many documents a source): each
expert's share of its layer's selections, and the mutual information between source and expert beside that of labels
shuffled over documents.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from trigram import Trigram

from analysis.counts.usage import UsageCounts, count_experts
from groundwork.atomic import write_json
from moe.load import load_model
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.training.corpus import read_corpus, token_stream
from moe.training.loss import document_losses
from traces.schema import SequenceTrace

LENGTH = 257
BATCH = 16


@click.command()
@click.option("--model", "model_path", default="models/mini-mixtral", show_default=True)
@click.option("--text", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--documents", default=60, show_default=True, help="Documents per source whose routing is counted.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(model_path: str, text: tuple[Path, ...], documents: int, json_file: Path | None) -> None:
    """Print held-out loss by source and routing health."""
    loaded = load_model(model_path, device="cpu", dtype="float32")
    corpus = read_corpus(list(text))
    training = token_stream([item for texts in corpus.train.values() for item in texts], loaded.tokenizer)
    held_out = {
        name: [row[:LENGTH] for row in token_stream(texts, loaded.tokenizer)]
        for name, texts in sorted(corpus.held_out.items())
    }
    losses = _losses(model_path, held_out, Trigram(training, loaded.config.vocab_size))
    click.echo(f"{'source':<18}{'documents':>10}{'tokens':>9}{'model':>8}{'trigram':>9}   nats per token")
    for name, row in losses.items():
        click.echo(f"{name:<18}{row['documents']:>10}{row['tokens']:>9}{row['model']:>8.3f}{row['trigram']:>9.3f}")
    worse = [name for name, row in losses.items() if row["model"] >= row["trigram"]]
    click.echo(f"sources where the model is not better: {', '.join(worse) or 'none'}")
    health = _routing(loaded, {name: rows[:documents] for name, rows in held_out.items()})
    click.echo("layer  smallest share  largest share  bits of source in expert  (shuffled labels: 97.5 %)")
    for layer, row in enumerate(health["layers"]):
        click.echo(
            f"{layer:>5}{row['smallest']:>16.3f}{row['largest']:>15.3f}{row['bits']:>26.4f}{row['shuffled_high']:>21.4f}"
        )
    if json_file is not None:
        write_json(json_file, {"losses": losses, "routing": health})


def _losses(model_path: str, held_out: dict[str, list[Any]], trigram: Trigram) -> dict[str, dict[str, float]]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    result = {}
    for name, rows in held_out.items():
        total, tokens = 0.0, 0
        for start in range(0, len(rows), BATCH):
            part = [torch.from_numpy(row).long() for row in rows[start : start + BATCH]]
            padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            total += document_losses(model, padded, torch.tensor([len(row) for row in part])).sum().item()
            tokens += sum(len(row) - 1 for row in part)
        reference = -sum(trigram.log_probabilities(row).sum() for row in rows)
        result[name] = {
            "documents": len(rows), "tokens": tokens, "model": total / tokens, "trigram": float(reference / tokens)
        }  # fmt: skip
    return result


def _routing(loaded: Any, held_out: dict[str, list[Any]]) -> dict[str, Any]:
    layout = find_routers(loaded.model)
    labels = [name for name, rows in held_out.items() for _ in rows]
    usage = UsageCounts(layout.num_layers, layout.num_experts, labels)
    by_source = []
    with ResidentTracer(loaded.model, layout) as tracer:
        for name, rows in held_out.items():
            counts = np.zeros((layout.num_layers, layout.num_experts), dtype=np.int64)
            for row in rows:
                routing = tracer.trace(torch.from_numpy(row).long()[None], torch.tensor([len(row)]))
                ids_TLK = routing.expert_ids_BTLK[0].numpy()
                counts += count_experts(ids_TLK, layout.num_experts)
                usage.add(_trace(name, row, ids_TLK))
            by_source.append(counts / counts.sum(axis=1, keepdims=True))
    share_LE = np.mean(by_source, axis=0)
    information = usage.mutual_information()
    assert information is not None
    return {
        "documents": len(labels),
        "layers": [
            {
                "smallest": float(share.min()),
                "largest": float(share.max()),
                "bits": float(bits),
                "shuffled_high": float(high),
            }
            for share, bits, high in zip(share_LE, information.bits_L, information.shuffled_high_L, strict=True)
        ],
    }  # fmt: skip


def _trace(name: str, tokens: Any, ids_TLK: Any) -> SequenceTrace:
    return SequenceTrace(
        dataset=name,
        sequence_id=0,
        sequence_key="",
        token_ids_T=tokens,
        tokens_T=[""] * len(tokens),
        phase_T=np.zeros(len(tokens), dtype=np.uint8),
        expert_ids_TLK=ids_TLK,
        routing_weights_TLK=None,
        router_logits_TLE=None,
        lookahead_logits_THLE=None,
    )


if __name__ == "__main__":
    main()
