"""Do tokens have the same experts while the model writes them as when it reads them? Counts where they do not.

    .venv/bin/python benchmarks/teacher_forcing.py [--model models/mini-mixtral] [--sequences 64] [--generate 64]

Texts found in this Python installation are continued with a key-value cache, in batches; then each text with its
continuation is run through the model again, whole and alone. Printed, for each precision, is the share of tokens and
layers in which the set of experts differs, and how far the last chosen expert's score is above the next one's: at most
there, and usually. Where scores tie but for rounding, either choice is right.
"""

from pathlib import Path

import click
import torch

from collection.preparation import prepare
from collection.running import BatchRunner
from collection.settings import CollectSettings
from moe.load import load_model
from moe.resident import ResidentTracer
from moe.routers import find_routers


@click.command()
@click.option("--model", default="models/mini-mixtral", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--sequences", default=64, show_default=True)
@click.option("--max_length", default=96, show_default=True)
@click.option("--generate", default=64, show_default=True)
def main(model: str, device: str, sequences: int, max_length: int, generate: int) -> None:
    """Print how often experts differ."""
    settings = CollectSettings(
        model=model,
        device=device,
        target_traces=sequences,
        max_length=max_length,
        generate=generate,
        output_dir=Path("routing_data") / "never_written",
    )
    layout = prepare(settings).layout
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(model, device=device, dtype=dtype, language_model=True)
        routers = find_routers(loaded.model)
        differing = {"given": 0, "decoded": 0}
        places, gaps, usual = dict(differing), [0.0], []
        with ResidentTracer(loaded.model, routers, ("logits",)) as tracer:
            runner = BatchRunner(tracer, new_tokens=generate, temperature=settings.temperature)
            for batch in layout.batches:
                decoded = runner.run(batch, [layout.sequences[each] for each in batch])
                assert decoded.decoded_BN is not None
                for row, number in enumerate(batch):
                    given = torch.from_numpy(layout.sequences[number].token_ids_T).long()
                    text_T = torch.cat([given, decoded.decoded_BN[row]])
                    whole = tracer.trace(text_T[None], torch.tensor([len(text_T)]))
                    assert whole.router_logits_BTLE is not None
                    left_TLK = decoded.expert_ids_BTLK[row, int(decoded.first_B[row]) :].sort(dim=-1).values
                    differs_TL = (left_TLK != whole.expert_ids_BTLK[0].sort(dim=-1).values).any(dim=-1)
                    for name, part in (("given", slice(len(given))), ("decoded", slice(len(given), None))):
                        differing[name] += int(differs_TL[part].sum())
                        places[name] += differs_TL[part].numel()
                    scores_TLE = whole.router_logits_BTLE[0].float().sort(dim=-1, descending=True).values
                    gap_TL = scores_TLE[..., routers.top_k - 1] - scores_TLE[..., routers.top_k]
                    gaps.append(float((gap_TL * differs_TL).max()))
                    usual.append(float(gap_TL.median()))
        for name, count in differing.items():
            click.echo(f"{dtype:<10}{name:<10}{count / places[name]:>10.4%} of {places[name]} sets differ")
        median = sorted(usual)[len(usual) // 2]
        click.echo(f"{dtype:<10}K-th score less the next one: {max(gaps):.4f} at most there, {median:.4f} usually")


if __name__ == "__main__":
    main()
