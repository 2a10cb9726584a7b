"""Which device and dtype to use when nobody says, and what allocators do."""

from __future__ import annotations

import math

import torch

SLAB_ALIGNMENT = 512  # bytes, at which pieces of a slab begin
_NO_HOST_MEMORY = "can't allocate memory"  # as PyTorch's allocator for the CPU says it


def default_device() -> torch.device:
    """The accelerator if there is one (CUDA or ROCm, then Intel's XPU, then MPS), else the CPU."""
    there = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None), "mps": torch.backends.mps}  # xpu: since 2.4
    return torch.device(next((kind for kind, module in there.items() if module and module.is_available()), "cpu"))


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, else float32.

    Native means Ampere and later on CUDA, an XPU that says so, AMX or AVX512-BF16 on a CPU: elsewhere bf16 is emulated
    and slower.
    """
    if device.type == "cuda":
        native = bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "xpu":
        native = getattr(torch.xpu, "is_bf16_supported", lambda: False)()
    elif device.type == "cpu":
        # private, and absent from some versions: then the answer is the safe one
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two names mean one device: "cuda" is the current card."""
    return _numbered(a) == _numbered(b)


def _numbered(device: torch.device) -> tuple[str, int]:
    current = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0
    return device.type, current if device.index is None else device.index


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the host has no memory left; PyTorch has no one type for that."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or _NO_HOST_MEMORY in str(error))


def out_of_host_memory(error: BaseException) -> bool:
    """Whether it is the host that has none left."""
    python = isinstance(error, MemoryError) and not isinstance(error, torch.cuda.OutOfMemoryError)
    return python or _NO_HOST_MEMORY in str(error)


def slab_bytes(piece: int) -> int:
    """The power of two that holds at least eight pieces: a slab of pinned memory."""
    return 2 ** math.ceil(math.log2(8 * max(piece, SLAB_ALIGNMENT)))
