"""How a model will be loaded, as its configuration and the free memory decide it, before any weight is read."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groundwork.errors import ConfigurationError
from groundwork.hardware import choose_devices, free_memory_bytes
from moe import quantize, stored
from moe.description import DTYPES, choose, count_by_component, sketch_model
from moe.quantizable import check_quantizable, quantized_bytes, two_layers_bytes
from moe.routers import RouterLayout
from moe.source import Source, find_source, quiet, require_safetensors
from moe.spreading import DeviceMap, spread

SHARE_FOR_WEIGHTS = 0.9  # of the free memory; the rest is for activations


@dataclass(frozen=True)
class Loading:
    """How a model will be loaded, as its configuration and the memory that is free now decide it.

    `stored` is how the checkpoint is quantised, None where it is not; `needed` and `free` are bytes. A model that
    several devices hold is on `device` first, and `placed` says where each of its parts is.
    """

    source: Source
    device: torch.device
    mode: str
    stored: str | None
    needed: int
    free: int
    placed: DeviceMap | None = None

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Return the devices that hold the model."""
        return tuple(dict.fromkeys((self.device, *(self.placed or {}).values())))


class TooLargeError(ConfigurationError):
    """The model does not fit in the device's free memory; `loading` is how it would have been loaded."""

    def __init__(self, message: str, loading: Loading) -> None:
        super().__init__(message)
        self.loading = loading


def foresee_loading(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    streamed: bool = False,
) -> Loading:
    """Return how `load_model` would load, and refuse what it would refuse before it reads weights.

    A `streamed` model is held a layer or two at a time, and what is quantised as no option asks for is restored; that
    takes one device, and ValueError is raised for several.
    """
    choose("--dtype", dtype, DTYPES)
    if quantization is not None:
        choose("--quantization", quantization, quantize.MODES)
    if attn_implementation:
        known = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith("paged|")]  # of serving
        choose("--attn_implementation", attn_implementation, ("eager", *sorted(known)))
    if experts_implementation:
        known = ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]
        choose("--experts_implementation", experts_implementation, tuple(known))
    devices = choose_devices(device)
    if streamed and len(devices) > 1:
        raise ValueError(f"device={device!r}: a streamed model is held by one device")
    source = find_source(path)
    sketch, layout = sketch_model(source, dtype)
    if attn_implementation:
        _check_attention(sketch, attn_implementation)
    loading = _settle_quantization(quantization, sketch, layout, devices, source, streamed)
    if not source.from_hub:
        require_safetensors(source)
    return loading


def _check_attention(sketch: PreTrainedModel, name: str) -> None:
    """Raise ConfigurationError where the model has no such attention, or the package that computes it is missing."""
    try:
        with quiet():
            sketch.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigurationError(
            f"--attn_implementation {name}: can not be used here ({reason}); use sdpa or eager, or install that"
        ) from error


def _settle_quantization(
    asked: str | None,
    sketch: PreTrainedModel,
    layout: RouterLayout,
    devices: tuple[torch.device, ...],
    source: Source,
    streamed: bool,
) -> Loading:
    """Return the mode to load in; raises ConfigurationError where the model can not fit or not be quantised so."""
    kept, device = stored.stored_mode(sketch.config), devices[0]
    stored.check_readable(kept, source.folder)
    if kept:
        if asked not in (None, "auto", kept):
            raise ConfigurationError(
                f"{source.folder}: the checkpoint is already quantised, as {kept}; leave --quantization out to run it "
                f"as it is, or name the original model for --quantization {asked}"
            )
        asked = stored.loaded_mode(kept, torch.device("cpu") if streamed else device)
    asked = asked or "none"
    if streamed:
        return _settle_streamed("none" if asked == "auto" else asked, kept, sketch, layout, device, source)
    needed = {"none": count_by_component(sketch, layout)["total"][1], **quantized_bytes(sketch, layout)}
    free = {each: free_memory_bytes(each) for each in devices}
    if asked == "auto":
        asked = most_precise(needed, sum(free.values())) if device.type == "cuda" else "none"
    if quantize.is_ours(asked):
        check_quantizable(sketch, layout, asked, device)
        size = needed[asked.replace("fp4", "nf4")]  # fp4 is only ever read
    else:
        size = stored.loaded_bytes(sketch, layout, asked)
    placed, fits = None, size <= free[device]
    if len(devices) > 1:
        placed, share = spread(sketch, layout, asked, size, free)
        fits = share <= SHARE_FOR_WEIGHTS
    loading = Loading(source, device, asked, kept, size, sum(free.values()), placed)
    if not fits:
        raise _too_large(loading, needed, devices, sketch)
    return loading


def _too_large(
    loading: Loading, needed: dict[str, int], devices: tuple[torch.device, ...], sketch: PreTrainedModel
) -> TooLargeError:
    room = loading.free if len(devices) == 1 else SHARE_FOR_WEIGHTS * loading.free
    smaller = [mode for mode in needed if needed[mode] <= room and needed[mode] < loading.needed]
    least = min(needed, key=lambda mode: needed[mode])
    of_original = f" on the model's original checkpoint, which is not {loading.stored}" if loading.stored else ""
    remedy = "use "
    if smaller:
        remedy = f"use --quantization {smaller[0]}{of_original}, "
    elif needed[least] < loading.needed:
        remedy = f"even --quantization {least} needs {needed[least] / 1e9:.1f} GB{of_original}; use "
    has = "has" if len(devices) == 1 else "together have"
    return TooLargeError(
        f"{loading.source.folder}: needs {loading.needed / 1e9:.1f} GB as {_spoken(loading.mode, sketch)}, and "
        f"{' and '.join(map(str, devices))} {has} {loading.free / 1e9:.1f} GB free; {remedy}a smaller model or a "
        "device with more memory",
        loading,
    )


def _settle_streamed(
    mode: str, kept: str | None, sketch: PreTrainedModel, layout: RouterLayout, device: torch.device, source: Source
) -> Loading:
    """Return how the model is loaded layer by layer; raises ConfigurationError where not even two layers fit."""
    if quantize.is_ours(mode):
        check_quantizable(sketch, layout, mode, device)
    free, needed = free_memory_bytes(device), two_layers_bytes(sketch, layout, mode)
    if needed > free:
        raise TooLargeError(
            f"{source.folder}: --execution streamed needs {needed / 1e9:.1f} GB, two layers and what lies outside of "
            f"layers as {_spoken(mode, sketch)}, and {device} has {free / 1e9:.1f} GB free; free memory, quantise, or "
            "use a smaller model",
            Loading(source, device, mode, kept, needed, free),
        )
    return Loading(source, device, mode, kept, needed, free)


def most_precise(needed: dict[str, int], free: int) -> str:
    """Return the first mode of mode -> bytes that fits into nine tenths of the free bytes; none where none does."""
    return next((mode for mode, size in needed.items() if size <= SHARE_FOR_WEIGHTS * free), "none")


def _spoken(mode: str, sketch: PreTrainedModel) -> str:
    dtype = str(sketch.dtype).removeprefix("torch.")
    return mode if quantize.is_ours(mode) or mode == "mxfp4" else dtype
