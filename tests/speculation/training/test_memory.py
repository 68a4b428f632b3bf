import pytest
import torch

from groundwork.errors import ConfigurationError
from speculation.training.memory import is_out_of_memory, micro_batch_tokens, peaks_gb
from speculation.training.precision import uses_bfloat16

CPU = torch.device("cpu")


def test_a_micro_batch_grows_with_what_the_budget_leaves() -> None:
    in_use = peaks_gb(CPU)["peak_host_memory_gb"]
    tokens = [micro_batch_tokens(CPU, in_use + more, 10**6, 10**6, 10**4) for more in (0.15, 0.30)]
    assert tokens == [32, 128]  # powers of two below 62 and 136; the weights take 0.024
    assert micro_batch_tokens(CPU, 10**3, 10**6, 10, 10) == 1024


def test_a_budget_below_what_one_token_takes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--memory_budget_gb 0.01: too little for [\d.]+ GB in use"):
        micro_batch_tokens(CPU, 0.01, 10**6, 10**6, 10**4)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_precision_is_what_was_asked_for_and_automatic_by_hardware() -> None:
    assert uses_bfloat16(CPU, "bfloat16")
    assert not uses_bfloat16(CPU, "float32")
    capabilities = torch.cpu.get_capabilities()
    assert uses_bfloat16(CPU, "auto") == any(
        bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )
    with pytest.raises(ConfigurationError, match="--precision int8: unknown; choose one of auto, float32, bfloat16"):
        uses_bfloat16(CPU, "int8")
