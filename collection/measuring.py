"""`--measure`: a few layers of the model itself are read from the disk, made ready and run with a batch of the plan."""

import time
from statistics import median
from typing import Any

import torch

from collection.plan import Layout
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from groundwork.profiles.execution import Rates
from groundwork.progress import log
from moe import quantize
from moe.foresight import Loading
from moe.streaming.calls import LayerCalls
from moe.streaming.layered import LayeredModel
from moe.streaming.load import open_layered

_LAYERS = 3  # measured; one more is read before, for what is imported and compiled once
_RUNS = 3


def measure_rates(settings: CollectSettings, loading: Loading, layout: Layout) -> Rates:
    """Return what this machine does with the run's model, in the mode of `loading`, and the median batch of its plan.

    The page cache is dropped for what is read. Checksums of a packed model are not compared, to leave them out of the
    time. Raises ConfigurationError as `open_layered` does, for a family that can not be run layer by layer, and where
    the system can not drop its page cache.
    """
    options: dict[str, Any] = {
        name: getattr(settings, name) for name in ("dtype", "attn_implementation", "experts_implementation")
    }
    mode = loading.mode if quantize.is_ours(loading.mode) or loading.stored is None else settings.quantization
    log("measuring the disk, and one layer after the other")
    _, layered = open_layered(settings.model, device=settings.first_device, quantization=mode, **options)
    layered.load_rest()
    ids_BT, mask_BT = (each.to(layered.device) for each in _median_batch(layout))
    try:
        calls = LayerCalls(layered)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"--measure: layers of {type(layered.model).__name__} can not be run one by one; leave it out"
        ) from error
    size, reading, readying, computing = 0, 0.0, 0.0, []
    for turn, index in enumerate(_spread(layered)):
        started = time.perf_counter()
        read = layered.read_cold(index)
        cold = time.perf_counter() - started
        started = time.perf_counter()
        layered.load(index)
        _finish(layered.device)
        ready = time.perf_counter() - started
        runs = [_seconds(calls, index, ids_BT, mask_BT) for _ in range(_RUNS)]
        layered.release(index)
        if turn:  # the first one pays for what happens once
            size, reading, readying = size + read, reading + cold, readying + ready
            computing += runs[1:]
    return Rates(size / reading, readying / size, median(computing) / ids_BT.numel())


def _spread(layered: LayeredModel) -> list[int]:
    """Return layers with experts, from all over the model: the first twice, where there is but one."""
    layers = layered.layout.moe_layers
    if len(layers) == 1:
        return [layers[0]] * 2
    wanted = min(_LAYERS + 1, len(layers))
    return [layers[number * (len(layers) - 1) // (wanted - 1)] for number in range(wanted)]


def _seconds(calls: LayerCalls, index: int, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Return what a batch takes in one layer, from host memory, where hidden states wait between two, to there."""
    hidden = calls.of(ids_BT, mask_BT)[index].hidden.cpu()
    started = time.perf_counter()
    call = calls.of(ids_BT, mask_BT)[index]
    calls.run(index, hidden.to(call.hidden.device, copy=True), call).cpu()
    return time.perf_counter() - started


def _median_batch(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and the mask of the batch of middling size."""
    lengths = layout.num_tokens_S
    batches = sorted(layout.batches, key=lambda batch: len(batch) * max(lengths[each] for each in batch))
    batch = [torch.from_numpy(layout.sequences[each].token_ids_T).long() for each in batches[len(batches) // 2]]
    ids_BT = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    lengths_B = torch.tensor([len(ids_T) for ids_T in batch])
    return ids_BT, (torch.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]).long()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
