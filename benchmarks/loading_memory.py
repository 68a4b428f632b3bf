"""Peak memory while a quantised model loads, beside its size in bfloat16 and when it is loaded.

    python benchmarks/loading_memory.py [--gigabytes 2]

writes a random Mixtral of that many bfloat16 gigabytes, a file of 180 MB for each layer under the published names, and
loads it on the CPU in a fresh process for each mode. The peak is VmHWM of /proc/self/status less what the
process held before loading; file pages that safetensors maps count too, though the kernel can take them back at any
time, so the peak of the process's own pages (RssAnon, sampled every 5 ms) stands beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, PreTrainedTokenizerFast

EXPERTS, HEAD, WIDTH, INTERMEDIATE = 8, 64, 1024, 3584  # a quarter of Mixtral-8x7B's widths
VOCABULARY = 512


def write_checkpoint(
    folder: Path,
    gigabytes: float,
    width: int = WIDTH,
    intermediate: int = INTERMEDIATE,
    vocabulary: int = VOCABULARY,
    head: int = HEAD,
    device: str = "cpu",
) -> None:
    """Write the model in a file for each layer, never holding more than one; random weights come from `device`."""
    layers = max(2, round(gigabytes * 1e9 / (2 * EXPERTS * 3 * width * intermediate)))
    generator = torch.Generator(device).manual_seed(0)
    expert_matrices = {"w1": (intermediate, width), "w2": (width, intermediate), "w3": (intermediate, width)}
    attention = {"q": width, "k": width // 4, "v": width // 4, "o": width}

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()

    weight_map: dict[str, str] = {}
    for number in range(-1, layers):
        name, tensors = f"model-{number:05d}.safetensors", {}
        if number < 0:
            tensors = {
                "model.embed_tokens.weight": random(vocabulary, width),
                "lm_head.weight": random(vocabulary, width),
            }
            tensors["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        else:
            layer = f"model.layers.{number}"
            for part, rows in attention.items():
                tensors[f"{layer}.self_attn.{part}_proj.weight"] = random(rows, width)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{layer}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
            tensors[f"{layer}.block_sparse_moe.gate.weight"] = random(EXPERTS, width)
            for expert in range(EXPERTS):
                for part, shape in expert_matrices.items():
                    tensors[f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight"] = random(*shape)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head // 4,
        num_local_experts=EXPERTS,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load(folder: str, mode: str) -> dict[str, float]:
    """Load in this process; return bytes: the peaks of all and of own pages, and what the model takes."""
    import bitsandbytes  # noqa: F401, before the baseline

    from moe.load import load_model

    own_peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal own_peak
        while not done.is_set():
            own_peak = max(own_peak, status("RssAnon"))
            time.sleep(0.005)

    before, own_before = status("VmRSS"), status("RssAnon")
    watcher = threading.Thread(target=sample)
    watcher.start()
    loaded = load_model(folder, device="cpu", quantization=mode)
    done.set()
    watcher.join()
    return {
        "peak": status("VmHWM") - before,
        "own": own_peak - own_before,
        "model": sum(each.nbytes for each in loaded.model.state_dict().values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(load(*arguments.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), arguments.gigabytes)
        whole = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"random Mixtral of {whole / 1e9:.2f} GB in bfloat16\n")
        print("| mode | model / bf16 | own peak / model | peak / model | peak / bf16 |")
        print("|---|---|---|---|---|")
        for mode in ("none", "int8", "nf4", "nf4-double"):
            command = [sys.executable, __file__, "--child", folder, mode]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            model, own, peak = found["model"], found["own"], found["peak"]
            print(
                f"| {mode} | {model / whole:.3f} | {own / model:.2f} | {peak / model:.2f} | {peak / whole:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
