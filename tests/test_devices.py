"""The facts of devices: products of float32 are as exact by every library, and settings are put back."""

from __future__ import annotations

import pytest
import torch

from layer_surgery import devices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    devices.float32_by_onednn.cache_clear()


def precisions() -> tuple[str, str, str]:
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    return torch.get_float32_matmul_precision(), *(backend.fp32_precision for backend in backends)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take oneDNN, whatever this processor is."""
    monkeypatch.setattr(devices, "float32_by_onednn", lambda: True)


def test_products_are_of_float32_in_the_block() -> None:
    left, right = torch.randn(300, 400), torch.randn(400, 200)
    exact = left.double() @ right.double()
    with devices.fast_products(CPU):
        found = left @ right
    assert float((found - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.usefixtures("by_onednn")
def test_the_settings_can_be_read_in_the_block_and_are_put_back() -> None:
    before = precisions()
    with devices.fast_products(CPU):
        assert precisions()[:2] == ("medium", "bf16")
    assert precisions() == before
    with devices.fast_products(torch.device("cuda")):
        assert precisions() == before


@pytest.mark.usefixtures("by_onednn")
def test_what_others_are_to_see_is_formed_as_torch_does() -> None:
    before = precisions()
    with devices.torchs_products():
        assert precisions() == before
    with devices.fast_products(CPU), devices.fast_products(CPU):
        with devices.torchs_products():
            assert precisions() == before
        assert precisions()[:2] == ("medium", "bf16")
    assert precisions() == before


def test_a_precision_that_somebody_has_set_for_a_backend_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "from_proc", lambda _file, _key: "AuthenticAMD")
    monkeypatch.setattr(devices, "_cpu_capability", lambda: "AVX512")
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with devices.fast_products(CPU):
            assert backend.fp32_precision == "tf32"
            assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        assert not devices.float32_by_onednn(), "the record would name a library that was not taken"
    finally:
        backend.fp32_precision = before


def test_a_library_that_rounds_to_bfloat16_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "from_proc", lambda _file, _key: "AuthenticAMD")
    monkeypatch.setattr(devices, "_cpu_capability", lambda: "AVX512")
    whole = torch.Tensor.__matmul__
    rounding = lambda a, b: whole(a.bfloat16(), b.bfloat16()).to(a.dtype) if a.dtype == torch.float32 else whole(a, b)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not devices.float32_by_onednn()


@pytest.mark.parametrize(("vendor", "capability"), [("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX2"), (None, "")])
def test_other_processors_keep_torchs_library(
    vendor: str | None, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "from_proc", lambda _file, _key: vendor)
    monkeypatch.setattr(devices, "_cpu_capability", lambda: capability)
    assert not devices.float32_by_onednn()


def test_several_processes_talk_by_gloo_where_each_has_no_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(devices, "cuda_devices", lambda: 2)
    assert [devices.backend(count) for count in (2, 3)] == ["cpu:gloo,cuda:nccl", "gloo"]
