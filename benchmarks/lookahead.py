"""Under which norm does a router, asked early, name more of the experts that it will choose?

    .venv/bin/python benchmarks/lookahead.py [--model models/mini-mixtral] [--sequences 400] [--horizons 3]

Layer l's router is asked h layers early, in two ways: on layer (l-h)'s router input as it is (`own`), and on the
residual stream before it, normalised by layer l's own norm (`next`). Printed for each h is recall at K, the share of
the K chosen experts among its K highest logits, over all tokens of the layers l >= h of texts found in this Python
installation, and the difference of the two; with 95 % intervals from a bootstrap over sequences. The default of
`--lookahead_norm` is what wins here.
"""

from pathlib import Path

import click
import numpy as np
import torch

from collection.preparation import prepare
from collection.running import BatchRunner
from collection.settings import CollectSettings
from groundwork.atomic import write_json
from groundwork.progress import progress
from moe.load import load_model
from moe.resident import LOOKAHEAD_NORMS, ResidentTracer
from moe.routers import find_routers
from speculation.bootstrap import interval, resampled_means

RESAMPLES = 2000


@click.command()
@click.option("--model", default="models/mini-mixtral", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--datasets", default="installed", show_default=True)
@click.option("--sequences", default=400, show_default=True)
@click.option("--max_length", default=256, show_default=True)
@click.option("--horizons", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    model: str, device: str, dtype: str, datasets: str, sequences: int, max_length: int, horizons: int, json_file: Path
) -> None:
    """Print recall at K by horizon for both norms."""
    settings = CollectSettings(
        model=model,
        device=device,
        dtype=dtype,
        datasets=datasets,
        target_traces=sequences,
        max_length=max_length,
        store=("lookahead",),
        lookahead=horizons,
        output_dir=Path("routing_data") / "never_written",
    )
    prepared = prepare(settings)
    loaded = load_model(model, device=device, dtype=dtype)
    routers = find_routers(loaded.model)
    sums = {name: np.zeros((len(prepared.layout.sequences), horizons)) for name in LOOKAHEAD_NORMS}
    for batch in progress(prepared.layout.batches, description="tracing", unit="batch"):
        texts = [prepared.layout.sequences[each] for each in batch]
        for name in LOOKAHEAD_NORMS:
            with ResidentTracer(loaded.model, routers, ("lookahead",), horizons, name) as tracer:
                routing = BatchRunner(tracer).run(batch, texts)
            assert routing.lookahead_logits_BTHLE is not None
            for row, (number, text) in enumerate(zip(batch, texts, strict=True)):
                own = slice(len(text.token_ids_T))
                ids_TLK = routing.expert_ids_BTLK[row, own].long()
                sums[name][number] = recalls(ids_TLK, routing.lookahead_logits_BTHLE[row, own])
    tokens_S = np.array(prepared.layout.num_tokens_S, dtype=np.float64)
    sums["next - own"] = sums["next"] - sums["own"]
    rows = {}
    for name, sums_SH in sums.items():
        samples_BH = resampled_means(sums_SH, tokens_S, RESAMPLES, seed=0)
        values_H = sums_SH.sum(axis=0) / tokens_S.sum()
        rows[name] = [interval(float(value), samples_BH[:, h]) for h, value in enumerate(values_H)]
    click.echo(
        f"{len(tokens_S)} sequences, {int(tokens_S.sum())} tokens; recall at {routers.top_k} of {routers.num_experts}"
    )
    for name, intervals in rows.items():
        for h, each in enumerate(intervals, start=1):
            click.echo(f"{name:<12} h = {h}   {each['value']:.4f}   [{each['low']:.4f}, {each['high']:.4f}]")
    if json_file is not None:
        write_json(json_file, rows)


def recalls(ids_TLK: torch.Tensor, lookahead_THLE: torch.Tensor) -> list[float]:
    """Return, for each horizon, the recall summed over tokens and averaged over the layers that can be foretold."""
    top_THLK = lookahead_THLE.float().topk(ids_TLK.shape[-1], dim=-1).indices
    named_THLK = (top_THLK[..., None] == ids_TLK[:, None, :, None, :]).any(dim=-1).double().mean(dim=-1)
    return [float(named_THLK[:, h - 1, h:].mean(dim=1).sum()) for h in range(1, lookahead_THLE.shape[1] + 1)]


if __name__ == "__main__":
    main()
