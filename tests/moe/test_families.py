"""Every mixture-of-experts family of transformers: traced as its experts received, whole and streamed, or refused."""

import re
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from families import END, START, with_tables
from tiny_models import tiny_config, tiny_model

from groundwork.errors import ConfigurationError
from moe.description import sketch_config
from moe.load import call_loader, read_weights
from moe.quantize import quantized_loading
from moe.resident import ResidentTracer
from moe.routers import find_routers
from moe.source import Source, quiet
from moe.split_experts import PerExpertLinears, matrix_shapes
from moe.streaming.captured import unpack
from moe.streaming.layered import LayeredModel
from moe.streaming.postponed import postponed_reading
from moe.streaming.tracer import StreamedTracer

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
def test_a_familys_experts_are_split_and_quantised_from_its_own_checkpoint(model_type: str, tmp_path: Path) -> None:
    original = tiny_model(model_type)
    original.save_pretrained(tmp_path)
    source = Source(tmp_path, model_type, None)
    layout = find_routers(original)
    quantised = find_routers(read_weights(AutoModel, source, "nf4", False, "auto", torch.device("cpu")))
    split_only = find_routers(split_without_quantising(tmp_path))
    generator = torch.Generator().manual_seed(2)
    for fused_site, exact_site, small_site in zip(layout.sites, split_only.sites, quantised.sites, strict=True):
        fused: Any = fused_site.experts
        exact, small = exact_site.experts, small_site.experts
        assert isinstance(exact, PerExpertLinears)
        assert isinstance(small, PerExpertLinears)
        for kept in (exact_site, small_site):
            assert torch.equal(next(fused_site.module.parameters()), next(kept.module.parameters()))
        hidden = torch.randn(20, matrix_shapes(fused, exact.split)["down_proj"][1], generator=generator)
        ids = torch.rand(20, len(fused.down_proj), generator=generator).argsort(dim=1)[:, :3]
        mixing = torch.rand(20, 3, generator=generator)
        # Sums of float32 in another order.
        torch.testing.assert_close(exact(hidden, ids, mixing), fused(hidden, ids, mixing), atol=1e-4, rtol=1e-3)
        for name in (*small.split.up, small.split.down):
            weight: Any = exact.get_submodule(f"1.{name}").weight
            assert type(exact.get_submodule(f"1.{name}")) is torch.nn.Linear
            stored: Any = small.get_submodule(f"1.{name}").weight
            restored = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
            assert float((restored - weight).norm() / weight.norm()) < 0.12  # NF4 of normal weights: about 0.09


# Their layers hand on more than hidden states: which tokens to attend to, or keys and values.
NOT_STREAMED = {
    "gemma4",
    "gemma4_text",
    "glm5_next",
    "glm5_next_text",
    "glm_moe_dsa",
    "hy_v4",
    "mistral_large4",
    "mistral_large4_text",
}


@pytest.mark.parametrize("model_type", named(3))
def test_a_family_is_streamed_bit_for_bit_or_refused(model_type: str, batch: Batch, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    source = Source(tmp_path, model_type, None)
    loading = (AutoModel, source, "none", False, "auto", torch.device("cpu"))
    whole = read_weights(*loading)
    with ResidentTracer(whole, find_routers(whole), ("weights", "logits")) as tracer:
        expected = tracer.trace(*batch)
    with postponed_reading() as postponed:
        call_loader(*loading)
    streamed = StreamedTracer(
        LayeredModel(postponed[0], find_routers(postponed[0].model), source, "none"), ("weights", "logits")
    )
    if model_type in NOT_STREAMED:
        with pytest.raises(ConfigurationError, match=f"^--execution streamed: {model_type} can not be run so, for"):
            streamed.__enter__()
        return
    hidden, shown = None, []
    with streamed, streamed.layers() as layers:
        for index in layers:
            hidden, of_layer = streamed.run(index, *batch, hidden)
            shown.append(of_layer)
    routing = unpack(shown, len(batch[0]), streamed.layout.num_experts, 0)
    assert expected.router_logits_BTLE is not None
    assert routing.router_logits_BTLE is not None
    assert torch.equal(routing.expert_ids_BTLK, expected.expert_ids_BTLK)
    assert torch.equal(routing.routing_weights_BTLK, expected.routing_weights_BTLK)
    assert torch.equal(routing.router_logits_BTLE, expected.router_logits_BTLE)


def split_without_quantising(folder: Path) -> PreTrainedModel:
    """Load a checkpoint as for quantising, but with every module left in full precision."""
    with quiet(), quantized_loading("int8") as options:
        options["quantization_config"].llm_int8_skip_modules = [".*"]
        model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}, **options)
    return model.requires_grad_(False)
