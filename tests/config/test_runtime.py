"""Options that say where and how computations run."""

from __future__ import annotations

import pytest
import torch

from layer_surgery import devices
from layer_surgery.config import RuntimeConfig
from layer_surgery.config.runtime import BFLOAT16_FROM

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("given", "device", "stored", "hidden_size", "capable", "expected"),
    [
        ("auto", CPU, torch.bfloat16, BFLOAT16_FROM, True, torch.bfloat16),
        ("auto", CPU, torch.bfloat16, BFLOAT16_FROM, False, torch.float32),
        ("auto", CPU, torch.bfloat16, BFLOAT16_FROM - 1, True, torch.float32),
        ("auto", CPU, torch.float32, BFLOAT16_FROM, True, torch.float32),
        ("auto", CPU, torch.float16, BFLOAT16_FROM, True, torch.float32),
        ("auto", CUDA, torch.float16, 8, False, torch.float16),
        ("float32", CPU, torch.bfloat16, BFLOAT16_FROM, True, torch.float32),
        ("bfloat16", CPU, torch.float32, 8, False, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_on_a_cpu_for_wide_models_that_are_stored_so_and_where_it_is_fast(
    given: str,
    device: torch.device,
    stored: torch.dtype,
    hidden_size: int,
    capable: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: capable)
    assert RuntimeConfig(dtype=given).torch_dtype(device, stored, hidden_size) == expected
