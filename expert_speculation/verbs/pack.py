"""`pack`: quantises a model once, a file for each layer, to be streamed."""

from pathlib import Path

import click

from expert_speculation.options import (
    PATH,
    ModeChoice,
    device_option,
    find_embedded,
    json_option,
    print_facts,
    write_results,
)


@click.command()
@click.argument("model", callback=find_embedded)
@click.argument("folder", metavar="OUT", type=PATH)
@click.option(
    "--quantization",
    type=ModeChoice(["nf4", "nf4-double", "int8"]),
    default="nf4",
    help="Precision of the experts, as of collect.",
)
@device_option
@json_option
def pack(model: str, folder: Path, quantization: str, device: str, json_file: Path | None) -> None:
    """Quantise the layers of MODEL, a folder or hub id, into the new folder OUT, with checksums.

    One layer at a time is in memory. `collect --model OUT --execution streamed` then reads a quarter of the bytes (with
    nf4) in each pass. Each run compares each file with its checksum once.
    """
    from moe.packed import pack as run

    index = run(model, folder, quantization=quantization, device=device)
    write_results(json_file, index)
    files = index["files"].values()
    print_facts(
        {
            "model": index["model"],
            "quantization": index["quantization"],
            "files": len(files),
            "bytes": sum(file["bytes"] for file in files),
            "folder": folder,
        }
    )
