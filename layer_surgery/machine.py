"""The machine and what it runs: versions, hardware, memory, and memory given back to the system."""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("layer-surgery", "torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval")
_CODE = (".py", ".jinja")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware as plain JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "code_sha256": code_sha256(),
        "platform": platform.platform(),
        "processor": _from_proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16 matrices (AVX-512 BF16 or AMX).

    Without them such products are slower than those of float32.
    """
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(is_there() for is_there in known if is_there is not None)


@functools.cache
def code_sha256(root: Path = Path(__file__).parent) -> str:
    """Return the SHA-256 (hexadecimal) of the package's modules and templates: it tells commits of one version apart.

    Computed once in a process.

    Args:
        root: folder of the package; its place and name do not count, nor do other files in it.
    """
    digest = hashlib.sha256()
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in _CODE):
        if path.startswith("calibration_data/"):  # only in an installed package, and checked by its manifest
            continue
        content = (root / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def version(package: str) -> str | None:
    """Return the installed version of a package, or None; of this one, that of the code that runs."""
    if package == "layer-surgery":
        return str(sys.modules["layer_surgery"].__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(device: torch.device) -> int:
    """Return the memory that this process has now: resident, or on a CUDA device allocated."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    found = _from_proc("self/status", "VmRSS")
    return int(found.split()[0]) * 1024 if found else peak_memory_bytes()


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """Return the highest allocated memory of a CUDA device since its statistics were reset; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def available_memory_bytes(device: torch.device) -> int | None:
    """Return how much more memory can be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = _from_proc("meminfo", "MemAvailable")
    return int(found.split()[0]) * 1024 if found else None


def _from_proc(file: str, key: str) -> str | None:
    """Return what stands behind the first `key:` in a file of /proc; None on a system that has none."""
    try:
        with open(f"/proc/{file}", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
    except OSError:
        return None


# Memory of layers that have gone is given back to the system (glibc only). glibc keeps freed blocks of up to 32 MiB for
# itself, and layers whose tensors differ in size fragment them. Measured on a model of 48 layers: resident memory grew
# by a third of a layer with every layer that had come and gone.

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 4 << 20


@functools.cache
def map_large_blocks() -> None:
    """Have blocks of 4 MiB and more mapped one by one, so that freeing one gives it back. Holds for the process."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def release_freed_memory() -> None:
    """Give back what smaller blocks have left."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(ctypes.c_size_t(0))


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(None)
        has_both = (library.mallopt, library.malloc_trim)
    except (OSError, AttributeError):  # another C library
        return None
    return library if all(has_both) else None
