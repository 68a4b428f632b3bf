"""Several GPUs on a machine without any: a program, for what it does to torch holds for the whole process.

Tensors on the device type `pretended` compute on the CPU, but say that they lie on `pretended:0`, `pretended:1` and so
on, and an operation on tensors of two of them is the error that it is on real ones. The program traces models that lie
on three, and streams the checkpoint that it is given to one; as JSON it prints, by case, which parts of what was
recorded differ from those of the model on the CPU.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe import foresight
from moe.decoding import Decoder
from moe.passes import BatchRouting
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.spreading import spread, with_head
from moe.streaming import reader
from moe.streaming.load import open_layered
from moe.streaming.tracer import StreamedTracer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_models import tiny_config, tiny_model

_aten = torch.ops.aten
_MAY_MIX = (_aten.copy_, _aten._to_copy, _aten.to, _aten.index)  # the last takes indices from the CPU
_CPU = torch.device("cpu")


class PretendedTensor(torch.Tensor):
    """A tensor that lies in `inner`, on the CPU, and says that it lies on another device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "PretendedTensor":
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class PretendedGpus(TorchDispatchMode):
    """A context in which `device="pretended:N"` gives tensors that pretend to be there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
    devices = {each.device for each in tensors if each.dim() or each.device != _CPU}  # CPU scalars go with all
    may_mix = func.overloadpacket in _MAY_MIX
    if len(devices) > 1 and not may_mix:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {devices}")
    named = [each for each in leaves if isinstance(each, torch.device)]
    device = (named or ([tensors[0].device] if may_mix else list(devices)) or [_CPU])[0]
    wrapper_of = {id(each.inner): each for each in tensors if isinstance(each, PretendedTensor)}

    def unwrap(each: Any) -> Any:
        if isinstance(each, torch.device):
            return _CPU
        return each.inner if isinstance(each, PretendedTensor) else each

    def wrap(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or device == _CPU:
            return each
        known = wrapper_of.get(id(each))  # of an operation in place
        return PretendedTensor(each, device) if known is None else known

    kwargs = {name: each for name, each in kwargs.items() if name != "pin_memory"}
    return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


def trace(model: PreTrainedModel) -> BatchRouting:
    """Return all that is recorded of a padded batch."""
    ids_BT, lengths_B, hidden_BT = _batch()
    with ResidentTracer(model, find_routers(model), ("weights", "logits", "lookahead"), horizons=2) as tracer:
        return tracer.trace(ids_BT, lengths_B, hidden_BT)


def decode(model: PreTrainedModel) -> BatchRouting:
    """Return all that is recorded of some tokens that the model writes."""
    ids_BT, lengths_B, _ = _batch()
    draws_BN = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with ResidentTracer(model, find_routers(model), ("weights", "logits", "lookahead"), horizons=1) as tracer:
        return Decoder(tracer, 5, 1.0).trace(ids_BT, lengths_B, draws_BN)


def compare(base: PreTrainedModel, model: PreTrainedModel, run: Callable[[PreTrainedModel], BatchRouting]) -> list[str]:
    """Spread `model` over three devices; return the parts of its routing that differ from those on the CPU."""
    for each in (base, model):
        each.set_attn_implementation("eager")  # others choose their kernel, and so the last bits, by the device
        each.set_experts_implementation("eager")
    wanted = run(model)
    size = sum(parameter.nbytes for parameter in base.parameters())
    devices = [torch.device(f"pretended:{index}") for index in range(3)]
    placed, _ = spread(base, find_routers(base), "none", size, dict.fromkeys(devices, size))
    with PretendedGpus():
        dispatch_model(model, placed if model is base else with_head(model, placed), skip_keys="past_key_values")
        assert {parameter.device for parameter in model.parameters()} == set(devices)
        found = run(model)
    names = [name for name in vars(wanted) if getattr(wanted, name) is not None]
    assert "lookahead_logits_BTHLE" in names
    return [name for name in names if not torch.equal(getattr(wanted, name), getattr(found, name))]


def stream(folder: str, device: str) -> dict[str, torch.Tensor]:
    """Return by layer the hidden states of a batch that is streamed, and what its routers showed."""
    ids_BT, lengths_B, hidden_BT = _batch()
    _, layered = open_layered(folder, device=device, attn_implementation="eager", experts_implementation="eager")
    recorded: dict[str, torch.Tensor] = {}
    with StreamedTracer(layered, ("weights", "logits", "lookahead"), horizons=2) as tracer, tracer.layers() as layers:
        hidden = None
        for index in layers:
            hidden, shown = tracer.run(index, ids_BT, lengths_B, hidden, hidden_BT)
            recorded |= {f"states.{index}": hidden.clone()} | {f"{index} {name}": each for name, each in shown.items()}
    assert layered.device == torch.device(device)
    return recorded


def compare_streamed(folder: str) -> list[str]:
    """Stream a checkpoint to a device; return what differs from streaming it to the CPU."""
    wanted = stream(folder, "cpu")
    foresight.choose_devices = lambda name: (torch.device(name),)
    reader._beside_computing = _in_the_thread_that_reads
    with PretendedGpus():
        found = stream(folder, "pretended:0")
    assert wanted.keys() == found.keys()
    return [name for name in wanted if not torch.equal(wanted[name], found[name])]


@contextmanager
def _in_the_thread_that_reads(stream: object) -> Iterator[None]:
    with PretendedGpus():
        yield


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths_B = torch.tensor([11, 7, 3])
    within_BT = torch.arange(11)[None, :] < lengths_B[:, None]
    ids_BT = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    hidden_BT = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.3
    return torch.where(within_BT, ids_BT, 0), lengths_B, hidden_BT & within_BT


def main() -> None:
    _setup_privateuseone_for_python_backend("pretended")
    stock = torch.tensor
    torch.tensor = lambda data, *, device=None, **options: stock(data, **options).to(device)  # it is not dispatched
    torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]  # which tensors of our own making do not know
    os.environ[reader._NO_THREADS] = "1"  # in which torch would know nothing of the devices
    differing = {"mixtral, streamed": compare_streamed(sys.argv[1])}
    for family in ("mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss"):
        model = tiny_model(family, num_hidden_layers=4)
        differing[family] = compare(model, model, trace)
    torch.manual_seed(0)
    writing = AutoModelForCausalLM.from_config(tiny_config("mixtral", num_hidden_layers=4)).eval().requires_grad_(False)
    differing["mixtral, decoding"] = compare(writing.base_model, writing, decode)
    print(json.dumps(differing))


if __name__ == "__main__":
    main()
