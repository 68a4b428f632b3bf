"""What a model's own forward calls each of its layers with: masks and positions, made as the model makes them.

The layers are replaced by stubs that hand the hidden states on and note what else they were given. So nothing of a
family's forward is written down here a second time. Whether a family can be run so is found out by asking twice with
different stand-ins for the layers' outputs: each layer must be given its predecessor's output itself, and beside it
nothing that depends on it, nor anything that layers could write to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from groundwork.errors import ConfigurationError
from moe.streaming.layered import LayeredModel


@dataclass(frozen=True)
class LayerCall:
    """What one layer is called with: hidden states, and all else."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerCalls:
    """Calls the layers of `layered` one by one, as its model would; from then on the model itself calls none.

    Raises ConfigurationError where the family can not be run layer by layer.
    """

    def __init__(self, layered: LayeredModel) -> None:
        self._layered = layered
        self._output: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden
        self._calls: list[LayerCall] = []
        self._order: list[int] = []
        for index, layer in enumerate(layered.layers):
            layer.forward = self._stub(index)
        self._check()

    def of(self, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[LayerCall]:
        """Return what each layer is called with for one batch; the first one's hidden states are the embeddings."""
        self._calls, self._order = [], []
        with torch.inference_mode():
            self._layered.model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False)
        calls, self._calls = self._calls, []
        return calls

    def run(self, index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return what layer `index` makes of the hidden states."""
        layer = self._layered.layers[index]
        with torch.inference_mode():
            output = type(layer).forward(layer, hidden, *call.args, **call.kwargs)
        if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
            raise self._refusal("its layers return more than hidden states")
        return output

    def _stub(self, index: int) -> Callable[..., torch.Tensor]:
        def stub(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            self._calls.append(LayerCall(hidden, rest, kwargs))
            self._order.append(index)
            return self._output(hidden)

        return stub

    def _check(self) -> None:
        device = self._layered.device
        ids_BT = torch.tensor([[1, 2, 3], [2, 1, 0]], device=device)
        mask_BT = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
        runs = []
        generator = torch.Generator().manual_seed(0)
        for scale in (0.0, 1.0):
            given: list[torch.Tensor] = []

            def stand_in(hidden: torch.Tensor, scale: float = scale, given: list[torch.Tensor] = given) -> torch.Tensor:
                noise = scale * torch.randn(hidden.shape, generator=generator)
                given.append(noise.to(hidden.device, hidden.dtype))
                return given[-1]

            self._output = stand_in
            try:
                calls = self.of(ids_BT, mask_BT)
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, KeyError) as error:
                raise self._refusal("its forward takes more than hidden states from a layer") from error
            finally:
                self._output = lambda hidden: hidden
            if self._order != list(range(len(self._layered.layers))):
                raise self._refusal("its forward does not call each layer once, in order")
            if any(call.hidden is not output for call, output in zip(calls[1:], given, strict=False)):
                raise self._refusal("its forward changes hidden states between layers")
            runs.append(calls)
        for one, two in zip(*runs, strict=True):
            if not _are_equal((one.args, one.kwargs), (two.args, two.kwargs)):
                raise self._refusal("its layers are given more of earlier layers than hidden states")

    def _refusal(self, reason: str) -> ConfigurationError:
        kind = self._layered.model.config.model_type
        return ConfigurationError(f"--execution streamed: {kind} can not be run so, for {reason}; use resident")


def _are_equal(left: Any, right: Any) -> bool:
    """Say whether two values are equal and of kinds that no layer can write to for the next one."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_are_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_are_equal(left[name], right[name]) for name in left)
    return left is None or (isinstance(left, bool | int | float | str | torch.dtype) and left == right)
