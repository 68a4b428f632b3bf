"""What quantising the experts costs: bytes, changed routing and time, for each mode in one run.

    python benchmarks/quantization.py [--model models/mini-mixtral] [--device cpu]

Text is found on this machine: passages of the eight installed kinds. Printed are bytes per expert parameter with its
share of the scales, as loaded; the share of tokens whose set of experts is the same as in full precision, over all
layers and layer by layer; and tokens per second relative to full precision, the median over rounds in which every mode
traces the same batch (CPU time of this process; on a GPU, time until it is done).
"""

import time
from itertools import islice
from statistics import median

import click
import torch

from collection.installed import KINDS, read_installed
from groundwork.hardware import choose_device, describe_device
from moe.load import LoadedModel, load_model
from moe.quantize import expert_bytes_per_parameter
from moe.resident import ResidentTracer
from moe.routers import find_routers

MODES = ("none", "int8", "nf4", "nf4-double")
LENGTH, BATCH = 256, 8
Batch = tuple[torch.Tensor, torch.Tensor]


@click.command()
@click.option("--model", "path", default="models/mini-mixtral", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--passages", default=24, show_default=True, help="Of each kind of text.")
@click.option("--rounds", default=7, show_default=True, help="In which every mode is timed.")
def main(path: str, device: str, passages: int, rounds: int) -> None:
    """Print the table of docs/MODELS.md."""
    target = choose_device(device)
    models = {mode: load_model(path, device=str(target), quantization=mode) for mode in MODES}
    sizes = {mode: _bytes(each) for mode, each in models.items()}  # a CPU packs 4-bit weights anew when it first runs
    batches = _batches(models["none"], passages)
    tracers = {mode: ResidentTracer(each.model, find_routers(each.model)) for mode, each in models.items()}
    routed = {mode: _routed(tracer, batches) for mode, tracer in tracers.items()}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds):
        for mode, tracer in tracers.items():
            seconds[mode].append(_seconds(tracer, batches[number % len(batches)], target))
    tokens = sum(int(lengths.sum()) for _, lengths in batches)
    dtype = models["none"].dtype
    click.echo(f"{path} in {dtype}, {tokens} tokens of {len(KINDS)} kinds of text, {describe_device(target)}\n")
    click.echo("| mode | bytes per expert parameter | same set of experts | by layer | throughput |")
    click.echo("|---|---|---|---|---|")
    for mode in MODES:
        equal_L = (routed[mode] == routed["none"]).all(dim=-1).double().mean(dim=0)
        speed = median(base / other for base, other in zip(seconds["none"], seconds[mode], strict=True))
        by_layer = " ".join(f"{share:.3f}" for share in equal_L.tolist())
        click.echo(f"| {mode} | {sizes[mode]:.3f} | {equal_L.mean():.3f} | {by_layer} | {speed:.2f} |")


def _batches(loaded: LoadedModel, passages: int) -> list[Batch]:
    """Return right-padded batches of the passages, sorted by length so that little is padding."""
    texts = [text for kind in sorted(KINDS) for _, text in islice(read_installed(kind), passages)]
    rows = sorted((loaded.tokenizer(text)["input_ids"][:LENGTH] for text in texts), key=len, reverse=True)
    batches = []
    for start in range(0, len(rows), BATCH):
        part = [torch.tensor(row) for row in rows[start : start + BATCH]]
        padded_BT = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        batches.append((padded_BT, torch.tensor([len(row) for row in part])))
    return batches


def _routed(tracer: ResidentTracer, batches: list[Batch]) -> torch.Tensor:
    """Return the sorted expert ids [tokens, L, K] of all real tokens."""
    found = []
    with tracer:
        for ids_BT, lengths_B in batches:
            real_BT = torch.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]
            found.append(tracer.trace(ids_BT, lengths_B).expert_ids_BTLK[real_BT])
    return torch.cat(found).sort(dim=-1).values


def _seconds(tracer: ResidentTracer, batch: Batch, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with tracer:
        start = clock()
        tracer.trace(*batch)  # ends with the routing on the CPU
        return clock() - start


def _bytes(loaded: LoadedModel) -> float:
    if loaded.quantization == "none":
        return float(loaded.model.dtype.itemsize)
    return expert_bytes_per_parameter(loaded.model)


if __name__ == "__main__":
    main()
