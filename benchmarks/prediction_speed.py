"""How long does a live prediction take, and how accurate is it, beside the time to fetch one expert?

    .venv/bin/python benchmarks/prediction_speed.py --shard_dir RUN --predictor_dir DIR [--predictor_dir DIR ...]
        [--hidden_size 2880 --intermediate_size 2880 --bits_per_weight 4.25] [--bandwidth_gb_s 25] [--tokens 217]
        [--context 0] [--device cpu]

One sequence is decoded live, `predict_next` before every layer and `observe` after it, on one processor core. Printed
for each predictor, in microseconds per layer: median and 95th percentile of predictions, the median of what
observing costs beside them, and both together as a share of one expert's transfer; and recall at K of a whole split.
`--context` has so many tokens observed before, the sequence's own over and over: 1024 fill interlayer's window.
`--device` is where neural predictors compute; on a GPU interlayer computes its scores while it observes.
An expert has three matrices of hidden_size x intermediate_size: gpt-oss-20b as above (MXFP4, 4.25 bits with scales)
13 MB, 0.53 ms at 25 GB/s; Mixtral-8x7B in NF4 --hidden_size 4096 --intermediate_size 14336 --bits_per_weight 4.127
(double quantisation) 91 MB, 3.6 ms.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from groundwork.atomic import write_json
from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_device, describe_device
from speculation.evaluation import evaluate
from speculation.features import RoutingBatch
from speculation.latency import decode_timed
from speculation.neural import NeuralPredictor
from speculation.predictor import load_predictors
from traces.reader import TraceDataset

MATRICES = 3  # gate, up and down


@click.command()
@click.option("--shard_dir", required=True, type=click.Path(path_type=Path))
@click.option("--predictor_dir", required=True, multiple=True, type=click.Path(path_type=Path))
@click.option("--split", default="validation_stop", show_default=True, help="Split of the sequence and of the recall.")
@click.option("--tokens", default=217, show_default=True, help="Length of the sequence that is decoded.")
@click.option("--context", default=0, show_default=True, help="Tokens observed before those.")
@click.option("--device", default="cpu", show_default=True, help="Of neural predictors; the others use the CPU.")
@click.option("--horizon", default=1, show_default=True)
@click.option("--hidden_size", default=2880, show_default=True)
@click.option("--intermediate_size", default=2880, show_default=True)
@click.option("--bits_per_weight", default=4.25, show_default=True)
@click.option("--bandwidth_gb_s", default=25.0, show_default=True, help="PCIe 4.0 x16 in practice.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    shard_dir: Path,
    predictor_dir: tuple[Path, ...],
    split: str,
    tokens: int,
    context: int,
    device: str,
    horizon: int,
    hidden_size: int,
    intermediate_size: int,
    bits_per_weight: float,
    bandwidth_gb_s: float,
    json_file: Path | None,
) -> None:
    """Print a Markdown table of latency and accuracy."""
    torch.set_num_threads(1)
    dataset = TraceDataset(shard_dir)
    predictors = load_predictors(predictor_dir)
    place = choose_device(device)
    for predictor in predictors.values():
        if isinstance(predictor, NeuralPredictor):
            predictor.to(place)
    expert_bytes = MATRICES * hidden_size * intermediate_size * bits_per_weight / 8
    transfer = expert_bytes / bandwidth_gb_s / 1e9 * 1e6
    batch = _sequence(dataset, split, tokens)
    accuracy = evaluate(dataset, predictors, split=split, horizon=horizon, bootstrap=200)
    top_k = str(dataset.spec.top_k)
    print(
        f"One expert: {expert_bytes / 1e6:.1f} MB, {transfer:.0f} us at {bandwidth_gb_s:g} GB/s. "
        f"{batch.num_tokens} tokens decoded after {context}, {horizon} ahead, one core, {describe_device(place)}.\n\n"
        f"| predictor | predict, median us | p95 us | observe, median us | share of a transfer | recall@{top_k} |\n"
        "|---|---|---|---|---|---|"
    )
    found: dict[str, Any] = {}
    for name, predictor in predictors.items():
        predict, observe = decode_timed(predictor, batch, horizon, context)
        figures = accuracy["predictors"][name]["recall"][top_k]
        row = {
            "predict_median_us": float(np.median(predict)),
            "predict_p95_us": float(np.percentile(predict, 95)),
            "observe_median_us": float(np.median(observe)),
            "share_of_transfer": float((np.median(predict) + np.median(observe)) / transfer),
            "recall": figures,
        }
        found[name] = row
        print(
            f"| {name} | {row['predict_median_us']:.0f} | {row['predict_p95_us']:.0f} | "
            f"{row['observe_median_us']:.0f} | {row['share_of_transfer']:.2f} | "
            f"{figures['value']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}] |"
        )
    if json_file is not None:
        write_json(json_file, {"expert_bytes": expert_bytes, "transfer_us": transfer, "predictors": found})


def _sequence(dataset: TraceDataset, split: str, tokens: int) -> RoutingBatch:
    """The first sequence of a split that is long enough, cut to `tokens`."""
    columns = sorted(dataset.available - {"ids"})
    for sequence in dataset.sequences(split, columns):
        if len(sequence.expert_ids_TLK) >= tokens:
            batch = RoutingBatch.from_sequences([sequence], dataset.spec)
            break
    else:
        raise ConfigurationError(f"--tokens {tokens}: no sequence of split {split} is that long; ask for fewer")
    columns_T = [name for name in vars(batch) if name not in ("offsets", "num_experts")]
    cut: dict[str, Any] = {
        name: None if getattr(batch, name) is None else getattr(batch, name)[:tokens] for name in columns_T
    }
    return RoutingBatch(**cut, offsets=torch.tensor([0, tokens]), num_experts=batch.num_experts)


if __name__ == "__main__":
    main()
