"""Muon for the weight matrices and AdamW for the rest, with a schedule of warm-up, plateau and linear decay.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises each matrix's update.
`torch.optim.Muon` takes matrices only, whereas transformers keeps the experts of a layer in one 3-D parameter, and
fuses gate and up projections; so it is given 2-D views of their storage, one for each matrix that the architecture
means.
"""

from torch import Tensor, nn
from torch.optim import AdamW, Muon

WARM_UP_STEPS = 50
DECAY_SHARE = 0.4
"""The learning rate falls linearly to zero over this last share of the steps."""

ADAM_RATE_SHARE = 0.75
"""AdamW's peak learning rate (embeddings, routers, norms) as a share of Muon's."""


class MixtralOptimizer:
    """The two optimizers of a `MixtralForCausalLM`, stepped and checkpointed as one.

    Args:
        model: the model, in float32.
        learning_rate: the peak; Muon's updates are scaled to AdamW's usual size (`match_rms_adamw`).
        steps: the schedule's length.
    """

    def __init__(self, model: nn.Module, learning_rate: float, steps: int) -> None:
        self.learning_rate = learning_rate
        self._steps = steps
        self._views: list[tuple[nn.Parameter, nn.Parameter, tuple[slice | int, ...]]] = []
        others = []
        for name, parameter in model.named_parameters():
            if "self_attn" in name or "mlp.experts" in name:
                self._views += [(parameter, nn.Parameter(parameter.data[at]), at) for at in _matrices(name, parameter)]
            else:
                others.append(parameter)
        self.muon = Muon(
            [view for _, view, _ in self._views], lr=1.0, adjust_lr_fn="match_rms_adamw", weight_decay=0.05
        )
        self.adam = AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, number: int) -> float:
        """Take optimizer step `number` (from 0) with the gradients at hand; returns the learning rate used."""
        rate = self.learning_rate * _schedule(number, self._steps)
        for optimizer, share in ((self.muon, 1.0), (self.adam, ADAM_RATE_SHARE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        for parameter, view, at in self._views:
            view.grad = None if parameter.grad is None else parameter.grad[at]
        self.muon.step()
        self.adam.step()
        return rate

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizers' state as named tensors, for a checkpoint."""
        return {
            f"{name}.{index}.{key}": value
            for name, optimizer in (("muon", self.muon), ("adam", self.adam))
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        for name, optimizer in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = {}
            for path, value in tensors.items():
                owner, index, key = path.split(".")
                if owner == name:
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _matrices(name: str, parameter: nn.Parameter) -> list[tuple[slice | int, ...]]:
    if parameter.ndim == 2:
        return [(slice(None),)]
    experts, rows, _ = parameter.shape
    parts = [slice(0, rows // 2), slice(rows // 2, rows)] if "gate_up_proj" in name else [slice(0, rows)]
    return [(expert, part) for expert in range(experts) for part in parts]


def _schedule(step: int, steps: int) -> float:
    warm_up = min(WARM_UP_STEPS, steps // 10 + 1)
    decay = max(1.0, DECAY_SHARE * steps)
    return min(1.0, (step + 1) / warm_up, (steps - step) / decay)
