"""What each kind of device can do and wants: the one file to look at for another kind of device. Knows torch only.

Elsewhere a device is only somewhere to compute. Kinds are torch's: `cpu` and `cuda` (AMD's GPUs call themselves so
too); what is measured or chosen for one kind stands here with the reason.
"""

import functools
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

KINDS = ("cpu", "cuda")

#: Rows of a block in which large products that are only half wanted are formed: small enough that little of what is not
#: wanted is computed, large enough that each is a product that the device is good at.
_BLOCK_ROWS = {"cpu": 512, "cuda": 4096}
#: Operations that one pass of a probe takes at most, and the largest side of what a probe decomposes: some seconds.
_PROBE_OPERATIONS = {"cpu": 2e10, "cuda": 2e13}
_PROBE_SIDE = {"cpu": 640, "cuda": 4096}
#: Numbers of 16 bits in 16 bytes: rows of weights that are multiples of it suit the kernels for experts (`grouped_mm`).
ROW_MULTIPLE = 8
#: Ranks and widths that are multiples of this suit tensor cores and their tiles.
TILE_MULTIPLE = 64
#: Relative error above which a product is none of float32: that of one rounded to bfloat16 is 2e-3.
_FLOAT32_ERROR = 5e-6


def block_rows(device: torch.device) -> int:
    """Return how many rows make a block of a large product on this device."""
    return _BLOCK_ROWS.get(device.type, _BLOCK_ROWS["cuda"])


def probe_operations(device: torch.device) -> float:
    """Return how many operations a pass of a probe may take."""
    return _PROBE_OPERATIONS.get(device.type, _PROBE_OPERATIONS["cuda"])


def probe_side(device: torch.device) -> int:
    """Return the largest side of a matrix that a probe decomposes."""
    return _PROBE_SIDE.get(device.type, _PROBE_SIDE["cuda"])


# -- what is there ---------------------------------------------------------------------------------------------------


def cuda_devices() -> int:
    """Return how many CUDA devices torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def backend(local_world: int) -> str:
    """Return how so many processes of one machine talk: by nccl too, where each has a GPU of its own."""
    own_gpus = torch.distributed.is_nccl_available() and local_world <= cuda_devices()
    return "cpu:gloo,cuda:nccl" if own_gpus else "gloo"


def device_name(device: torch.device) -> str:
    """Return what the device is called, `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16 matrices (AVX-512 BF16 or AMX).

    Without them such products are slower than those of float32.
    """
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(is_there() for is_there in known if is_there is not None)


def fast_dtype(device: torch.device, stored: torch.dtype, *, wide: bool) -> torch.dtype:
    """Return what a checkpoint stored in this dtype is computed in; `wide` if products take most of the time.

    On an accelerator as it is stored. A CPU that multiplies bfloat16 gives the same loss in half of the time or less,
    others take float32.
    """
    if device.type != "cpu":
        return stored
    return stored if stored == torch.bfloat16 and wide and cpu_multiplies_bfloat16() else torch.float32


@functools.cache
def float32_by_onednn() -> bool:
    """Return whether float32 products on this CPU had better be formed by oneDNN than by MKL.

    MKL takes no AVX-512 on other CPUs than Intel's: on an AMD EPYC of 2024 a core does 90 GFLOP/s with it, and 200 with
    oneDNN, at the same error (`experiments/scale/products.py`). torch hands such products to oneDNN only where they may
    be rounded to bfloat16 inside, which oneDNN does with AMX; so it is tried whether they are.
    """
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.mkl)
    there = all(library.is_available() for library in libraries)
    if not there or from_proc("cpuinfo", "vendor_id") != "AuthenticAMD" or "AVX512" not in _cpu_capability():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = left.double() @ right.double()
    with _products_by_onednn() as changed:
        error = float((left @ right - exact).norm() / exact.norm())
    return changed and error < _FLOAT32_ERROR


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Have products on a CPU formed by the library that is fastest on this machine, for the duration of the block."""
    with _products_by_onednn() if device.type == "cpu" and float32_by_onednn() else nullcontext():
        yield


@contextmanager
def torchs_products() -> Iterator[None]:
    """Have products formed as torch does by itself, also within `fast_products`.

    So times and scores are those that others see; and for the few rows of a generation oneDNN takes longer.
    """
    if not _SET_BEFORE:
        yield
        return
    fast = _precisions()
    _set_precisions(_SET_BEFORE[0])
    try:
        yield
    finally:
        _set_precisions(fast)


#: What was set before `fast_products`, of each block that is entered.
_SET_BEFORE: list[tuple[str, list[str]]] = []


@contextmanager
def _products_by_onednn() -> Iterator[bool]:
    """Let products of float32 be rounded inside; yield whether that is so.

    Nothing changes if the precision of a backend has been set by itself.
    `set_float32_matmul_precision` also speaks for CUDA; what it does there holds in the block only.
    """
    try:
        before = _precisions()
    except RuntimeError:  # precisions of single backends do not go together with one for all
        yield False
        return
    _SET_BEFORE.append(before)
    torch.set_float32_matmul_precision("medium")
    try:
        yield True
    finally:
        _set_precisions(_SET_BEFORE.pop())


def _precisions() -> tuple[str, list[str]]:
    """Return the precision of float32 products, and what is set for each backend by itself."""
    return torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in _backends()]


def _set_precisions(precisions: tuple[str, list[str]]) -> None:
    torch.set_float32_matmul_precision(precisions[0])
    for backend, precision in zip(_backends(), precisions[1], strict=True):
        backend.fp32_precision = precision


def _backends() -> list[Any]:
    return [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]  # type: ignore[attr-defined]


def _cpu_capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


# -- memory ----------------------------------------------------------------------------------------------------------


def wants_pinned_memory(device: torch.device) -> bool:
    """Return whether what is copied to the device had better be in pinned memory of the host."""
    return device.type == "cuda"


def frees_to_system(device: torch.device) -> bool:
    """Return whether freed memory of the device has to be given back through the C library (`machine`)."""
    return device.type == "cpu"


def moves_beside(device: torch.device) -> bool:
    """Return whether weights can be moved to the device while it computes, in a stream of their own."""
    return device.type == "cuda"


def random_devices(device: torch.device) -> list[torch.device]:
    """Return the devices with random states of their own, beside the CPU's."""
    return [device] if device.type == "cuda" else []


def memory_shares(device: torch.device, cpu_bytes: int) -> tuple[int, int]:
    """Return bytes that layers which stay and hidden states may take: `cpu_bytes` each, or shares of what is free."""
    if device.type != "cuda":
        return cpu_bytes, cpu_bytes
    free = int(torch.cuda.mem_get_info(device)[0])
    return free // 2, free // 4


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(device: torch.device) -> int:
    """Return the memory that this process has now: resident, or on a CUDA device allocated."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    found = from_proc("self/status", "VmRSS")
    return int(found.split()[0]) * 1024 if found else peak_memory_bytes()


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """Return the highest allocated memory of a CUDA device since its statistics were reset; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_device_memory(device: torch.device) -> None:
    """Begin to count the peak of `peak_device_memory_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def available_memory_bytes(device: torch.device) -> int | None:
    """Return how much more memory can be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = from_proc("meminfo", "MemAvailable")
    return int(found.split()[0]) * 1024 if found else None


def from_proc(file: str, key: str) -> str | None:
    """Return what stands behind the first `key:` in a file of /proc; None on a system that has none."""
    try:
        with open(f"/proc/{file}", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
    except OSError:
        return None


# -- time ------------------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given: an accelerator works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Return the seconds of a clock when the device has done what it was given."""
    wait_for(device)
    return time.perf_counter()
