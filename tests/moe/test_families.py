"""Every mixture-of-experts family of the installed transformers: traced as its experts received, or refused by name."""

import re
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from families import END, START, with_tables
from tiny_models import tiny_config, tiny_model

from groundwork.errors import ConfigurationError
from moe.description import sketch_config
from moe.load import read_weights
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.source import Source
from moe.split_experts import PerExpertLinears

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "MODELS.md"
TABLES = DOCUMENT.read_text().partition(START)[2].partition(END)[0]
ROWS = [line.strip("|").split("|") for line in TABLES.splitlines() if line.startswith("| `")]


def named(columns: int, last: str = "") -> list[str]:
    """The model types of the documented rows with so many columns, of which the last one begins so."""
    rows = [row for row in ROWS if len(row) == columns and row[-1].strip().startswith(last)]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


Batch = tuple[torch.Tensor, torch.Tensor]


def test_the_documented_tables_are_what_the_library_holds() -> None:
    text = DOCUMENT.read_text()
    assert with_tables(text) == text, "run: python benchmarks/families.py docs/MODELS.md"


@pytest.mark.parametrize("model_type", named(3))
def test_a_covered_family_is_traced_as_its_experts_received(model_type: str, batch: Batch) -> None:
    model = tiny_model(model_type)
    received: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        ids = next(each for each in tensors if not each.is_floating_point())
        weights = next(each for each in tensors if each.is_floating_point() and each.shape == ids.shape)
        assert module not in received
        received[module] = ids.clone(), weights.clone()

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in experts]
    layout = find_routers(model)
    with ResidentTracer(model, layout, ("weights", "logits")) as tracer:
        routing = tracer.trace(*batch)
    for handle in handles:
        handle.remove()
    B, T, L, K = routing.expert_ids_BTLK.shape
    assert (*batch[0].shape, len(received), layout.top_k) == (B, T, L, K)
    assert routing.router_logits_BTLE is not None
    assert routing.router_logits_BTLE.shape == (B, T, L, layout.num_experts)
    assert routing.router_logits_BTLE.isfinite().all()
    for layer, module in enumerate(experts):
        ids_NK, weights_NK = (each.reshape(B * T, K) for each in received[module])
        weights_NK, order_NK = weights_NK.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(routing.expert_ids_BTLK[:, :, layer].reshape(B * T, K).long(), ids_NK.gather(1, order_NK))
        assert torch.equal(routing.routing_weights_BTLK[:, :, layer].reshape(B * T, K), weights_NK.half())
        assert len(ids_NK.unique()) > K, "a router that sends all tokens to the same experts compares nothing"


@pytest.mark.parametrize("model_type", named(2))
def test_a_family_outside_the_adapter_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^\w+ can not be traced: .*choose a model of another family"):
        sketch_config(tiny_config(model_type), torch.float32)


@pytest.mark.parametrize("model_type", named(3, "yes"))
def test_a_familys_experts_are_quantised_from_its_own_checkpoint(model_type: str, tmp_path: Path) -> None:
    original = tiny_model(model_type)
    original.save_pretrained(tmp_path)
    source = Source(tmp_path, model_type, None)
    loaded = read_weights(AutoModel, source, "nf4", False, "auto", torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for whole, quantised in zip(find_routers(original).sites, find_routers(loaded).sites, strict=True):
        fused: Any = whole.experts
        split = quantised.experts
        assert isinstance(split, PerExpertLinears)
        assert torch.equal(next(whole.module.parameters()), next(quantised.module.parameters()))
        gate, up = fused.gate_up_proj[1].chunk(2)
        for name, weight in zip(split.names, (gate, up, fused.down_proj[1]), strict=True):
            stored: Any = split.get_submodule(f"1.{name}").weight
            restored = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
            assert float((restored - weight).norm() / weight.norm()) < 0.12  # NF4 of normal weights: about 0.09
        exact = PerExpertLinears(fused, split.names)
        for expert in range(len(fused.down_proj)):
            weights = (*fused.gate_up_proj[expert].chunk(2), fused.down_proj[expert])
            for name, weight in zip(split.names, weights, strict=True):
                exact.get_submodule(f"{expert}.{name}").weight.data = weight
        hidden = torch.randn(20, fused.down_proj.shape[1], generator=generator)
        ids = torch.rand(20, len(fused.down_proj), generator=generator).argsort(dim=1)[:, :3]
        mixing = torch.rand(20, 3, generator=generator)
        # Sums of float32 in another order.
        torch.testing.assert_close(exact(hidden, ids, mixing), fused(hidden, ids, mixing), atol=1e-4, rtol=1e-3)
