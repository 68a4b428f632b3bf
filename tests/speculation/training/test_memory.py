import re

import pytest
import torch

from groundwork.errors import ConfigurationError
from groundwork.hardware import peak_memory_bytes
from speculation.training.memory import BESIDE_ON_CPU, is_out_of_memory, micro_batch_tokens
from speculation.training.precision import uses_bfloat16

CPU = torch.device("cpu")


def test_a_micro_batch_grows_with_what_the_budget_leaves() -> None:
    fixed = (peak_memory_bytes(CPU) + BESIDE_ON_CPU) / 1e9
    tokens = [micro_batch_tokens(CPU, fixed + more, 10**6, 10**6, 10**4) for more in (0.15, 0.30)]
    assert tokens == [32, 128]  # powers of two below 62 and 136; the weights take 0.024
    assert micro_batch_tokens(CPU, 10**3, 10**6, 10, 10) == 1024


def test_a_budget_below_what_one_token_takes_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ConfigurationError, match=r"--memory_budget_gb 0.01: too little for [\d.]+ GB in use") as error:
        micro_batch_tokens(CPU, 0.01, 10**6, 10**6, 10**4)
    found = re.search(r"; give at least ([\d.]+) or make the predictor smaller", str(error.value))
    assert found is not None
    least = float(found[1])
    assert micro_batch_tokens(CPU, least, 10**6, 10**6, 10**4) >= 1
    with pytest.raises(ConfigurationError, match="too little"):
        micro_batch_tokens(CPU, least - 0.02, 10**6, 10**6, 10**4)


def test_more_than_the_machine_has_is_said_to_be_so() -> None:
    with pytest.raises(ConfigurationError, match=r"\d GB are needed and [\d.e+]+ GB are there; free memory or make"):
        micro_batch_tokens(CPU, 10**9, 10**14, 10**6, 10**4)


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
