"""The table of docs/HARDWARE.md that says what tracing takes, resident and streamed: estimates from the profiles.

Sizes are the model profiles', where all but the experts is in 16 bits, without the head. See `ASSUMED` for the rest.
"""

from groundwork.profiles.execution import JOINED, Rates, resident_seconds, streamed_seconds
from groundwork.profiles.hardware import HardwareProfile
from groundwork.profiles.loading import hardware_profile, model_profile
from groundwork.profiles.model import ModelProfile

MACHINES = ("rtx-3090", "rtx-4090", "rtx-a6000", "a100-40gb", "a100-80gb", "h100")
HIDDEN_SIZES = {"mixtral-8x7b": 4096, "gpt-oss-20b": 2880, "deepseek-v2-lite": 2048}  # from the profiles' sources
PASS_TOKENS, BATCH_TOKENS = 2**19, 2**14
SHARE_OF_PRODUCTS = 0.5
SHARE_OF_LINK = 0.5
SHARE_FOR_WEIGHTS = 0.9
ASSUMED = f"""\
Estimates: none of these runs has been made. From the profiles above, for passes of {PASS_TOKENS:,} tokens, batches of
{BATCH_TOKENS:,} and no padding. Assumed: layers reach {SHARE_OF_PRODUCTS:g} of the machine's rate of 16-bit products,
whatever the precision of their weights; copies, which come from mapped files and not from pinned memory,
{SHARE_OF_LINK:g} of its link; a checkpoint that fits into RAM beside the hidden states of a pass is read from the disk
once, any other once a pass. GB are GPU memory: weights and the activations of a batch. Minutes are a million tokens',
without the start, which reads the checkpoint once. "As stored" reads the published precision and computes in 16 bits,
NF4 reads what `pack` made; "read" are GB from the disk for a million tokens beyond the start.
"""


def table() -> str:
    """Return the table and its assumptions, in Markdown."""
    lines = [
        "| model | machine | resident | GB | minutes | streamed as stored, GB | read | minutes | streamed NF4, GB | "
        "read | minutes | `--execution auto` |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in HIDDEN_SIZES:
        lines += [_row(name, model_profile(name), machine, hardware_profile(machine)) for machine in MACHINES]
    return ASSUMED + "\n" + "\n".join(lines) + "\n"


def _row(name: str, model: ModelProfile, machine: str, hardware: HardwareProfile) -> str:
    inner = model.expert_parameters / (3 * HIDDEN_SIZES[name])
    token = 2 * (model.top_k * (3 * inner + HIDDEN_SIZES[name]) + 4 * HIDDEN_SIZES[name])  # bytes, as moe/footprint.py
    activations = BATCH_TOKENS * token
    room = SHARE_FOR_WEIGHTS * hardware.gpu_memory_bytes
    fitting = [each for each in _resident_modes(model) if _whole(model, each) <= room]
    cells = ["none fits", "-", "-"]
    if fitting:
        size = _whole(model, fitting[0])
        _, seconds = resident_seconds(size, 10**6, model.moe_layers, _rates(model, hardware))
        cells = [fitting[0], _gb(size + activations), f"{seconds / 60:.1f}"]
    for stored, held in ((model.default_precision, "bf16"), ("nf4", "nf4")):
        if stored == "nf4" and model.default_precision != "bf16":
            cells += ["-", "-", "-"]  # a checkpoint that is quantised already is not quantised again
            continue
        joined = JOINED if held == "bf16" else 0  # quantised matrices stay apart
        device = _outside(model) + (2 + joined) * _layer(model, held) + activations
        read, minutes = _streamed(name, model, hardware, stored)
        cells += [_gb(device), f"{read / 1e9:.0f}", f"{minutes:.1f}"]
    return f"| {model.name} | `{machine}` | {' | '.join(cells)} | {'resident' if fitting else 'streamed'} |"


def _streamed(name: str, model: ModelProfile, hardware: HardwareProfile, stored: str) -> tuple[float, float]:
    """Return the bytes that a million tokens read from the disk in passes, and the minutes that they take."""
    layers = [_layer(model, stored)] * model.moe_layers
    states = 2 * PASS_TOKENS * HIDDEN_SIZES[name]
    cached = sum(layers) + states <= hardware.ram_bytes
    rates = _rates(model, hardware)
    _, seconds = streamed_seconds(_outside(model), layers, [PASS_TOKENS], rates, cached)
    passes = 10**6 / PASS_TOKENS
    return (0 if cached else sum(layers) * passes), seconds / 60 * passes


def _rates(model: ModelProfile, hardware: HardwareProfile) -> Rates:
    active = model.top_k * model.expert_parameters + model.layer_parameters
    return Rates(
        disk_bytes_per_s=hardware.disk_bytes_per_s,
        ready_s_per_byte=1 / (SHARE_OF_LINK * hardware.link_bytes_per_s),
        token_layer_s=2 * active / (SHARE_OF_PRODUCTS * hardware.operations_per_s),
    )


def _resident_modes(model: ModelProfile) -> list[str]:
    """Return the precisions that `--quantization auto` tries, in its order."""
    if model.default_precision != "bf16":
        return [model.default_precision]
    return ["bf16", "int8", "nf4", "nf4-double"]


def _whole(model: ModelProfile, precision: str) -> int:
    return _outside(model) + model.moe_layers * _layer(model, precision)


def _layer(model: ModelProfile, precision: str) -> int:
    return model.layer_read_bytes() + model.num_experts * model.expert_bytes(precision)


def _outside(model: ModelProfile) -> int:
    """Return the bytes of all that lies outside of MoE layers, without the head, as large as the embeddings."""
    return round((model.other_parameters - model.embedding_parameters) * model.resident_bytes_per_parameter)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
